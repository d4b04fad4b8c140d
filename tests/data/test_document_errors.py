"""What the user must fix: the key, the place and the way out stand in the message."""

import sysconfig
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.errors import UserError
from megallama.data.documents import find_source, read_documents, source_digest
from tests.data.conftest import unprivileged, user_error

KEY = "data.sources.0.path"


def read(path: object) -> None:
    list(read_documents(find_source(str(path), KEY)))


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere/*.jsonl", "no\0where", "a" * 5000])
def test_no_file_matches(path: str):
    with user_error(KEY, repr(path), "no readable file matches", str(Path.cwd())):
        find_source(path, KEY)


def test_folder(tmp_path: Path):
    with user_error(KEY, f"{str(tmp_path)!r} is a folder", f"{tmp_path}/**/*.jsonl"):
        find_source(str(tmp_path), KEY)


def test_glob_of_folders_only(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    with user_error(KEY, "is a folder", f"{tmp_path}/sub/**/*.jsonl"):
        find_source(f"{tmp_path}/*", KEY)


@pytest.mark.parametrize("name", ["a.md", "a", "a.jsonl.gz"])
def test_unknown_extension(tmp_path: Path, name: str):
    (tmp_path / "b.txt").write_text("fine")
    (tmp_path / name).write_text("x")
    with user_error(KEY, str(tmp_path / name), ".txt, .jsonl, .parquet"):
        find_source(f"{tmp_path}/*", KEY)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_files(tmp_path: Path, name: str):
    (tmp_path / name).write_text("")
    (tmp_path / f"b{name}").write_text("")
    path = f"{tmp_path}/*"
    with user_error(KEY, repr(path), "no text", "2"):
        read(path)


def test_empty_parquet(tmp_path: Path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with user_error(KEY, "no text"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{text: x}", ["is not JSON"]),
        ('{"text": "x"', ["is not JSON"]),
        ("[" * 100_000, ["is not JSON"]),
        ('{"body": "x", "id": 1}', ["no field 'text'", "body, id"]),
        ("{}", ["no field 'text'"]),
        ('"text"', ["no field 'text'", "str"]),
        ("3", ["no field 'text'", "int"]),
        ('{"text": null}', ["NoneType, not a string"]),
        ('{"text": ["x"]}', ["list, not a string"]),
        ('{"text": "\\ud800"}', ["not Unicode"]),
    ],
)
def test_bad_jsonl_line(tmp_path: Path, line: str, parts: list[str]):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with user_error(KEY, f"{file}:3", *parts):
        read(file)


def test_not_utf8(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes("café".encode("latin-1"))
    with user_error(KEY, str(file), "not UTF-8", "byte 3"):
        read(file)


def test_not_utf8_in_jsonl(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with user_error(KEY, f"{file}:2", "not UTF-8"):
        read(file)


def test_not_utf8_in_parquet(tmp_path: Path):
    file = tmp_path / "a.parquet"
    column = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), file)
    with user_error(KEY, f"{file}:2", "not UTF-8"):
        read(file)


def test_parquet_without_the_column(tmp_path: Path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), file)
    with user_error(KEY, str(file), "no column 'text'", "body, id"):
        read(file)


def test_parquet_of_numbers(tmp_path: Path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), file)
    with user_error(KEY, str(file), "int64, not strings"):
        read(file)


def test_parquet_with_null(tmp_path: Path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", None]}), file)
    with user_error(KEY, f"{file}:2", "null, not a string"):
        read(file)


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"\0" * 50 + b"PAR1"])
def test_corrupt_parquet(tmp_path: Path, content: bytes):
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    with user_error(KEY, str(file)):
        read(file)


@given(where=st.floats(0, 1), size=st.sampled_from([1, 16, 100]), footer=st.booleans())
@settings(deadline=None, max_examples=40)
def test_damaged_parquet_ends_in_no_other_error(where: float, size: int, footer: bool):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.parquet"
        rows = [f"row {n} " * 9 for n in range(1000)]
        pq.write_table(pa.table({"text": rows}), file, row_group_size=200)
        data = bytearray(file.read_bytes())
        first = len(data) - 2000 if footer else 0
        start = first + int(where * (len(data) - first))
        data[start : start + size] = (byte ^ 0xFF for byte in data[start : start + size])
        file.write_bytes(data)
        try:
            read(file)  # without checksums, damage may go unseen
        except UserError as error:
            assert str(file) in str(error)


def test_parquet_checksums_are_verified(tmp_path: Path):
    file = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {n}" for n in range(1000)]})
    pq.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
    file.write_bytes(file.read_bytes().replace(b"row 500", b"row 5O0"))
    with user_error(KEY, str(file), "checksum"):
        read(file)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_no_permission(open_folder: Path, name: str):
    file = open_folder / name
    file.write_text("x")
    file.chmod(0)
    with unprivileged(), user_error(KEY, str(file), "Permission denied"):
        read(file)


def test_no_permission_for_the_folder(open_folder: Path):
    inner = open_folder / "closed"
    inner.mkdir()
    (inner / "a.txt").write_text("x")
    inner.chmod(0)
    with unprivileged(), user_error(KEY, "a.txt", "Permission denied"):
        find_source(str(inner / "a.txt"), KEY)
    inner.chmod(0o755)


def test_file_that_has_gone(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    source = find_source(f"{tmp_path}/*.txt", KEY)
    (tmp_path / "a.txt").unlink()
    with user_error(KEY, "a.txt", "No such file"):
        source_digest(source)
    with user_error(KEY, "a.txt", "No such file"):
        list(read_documents(source))


def test_link_to_nowhere(tmp_path: Path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with user_error(KEY, "a.txt", "No such file"):
        source_digest(find_source(str(tmp_path / "a.txt"), KEY))


def test_stdlib_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with user_error(KEY, str(tmp_path), "files of your own"):
        find_source("stdlib", KEY)
