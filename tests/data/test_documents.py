import json
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megallama.data.documents import Document, find_source, read_documents, source_digest

KEY = "data.sources.0.path"


def read(path: object) -> list[Document]:
    return list(read_documents(find_source(str(path), KEY)))


def texts(path: object) -> list[str]:
    return [document.text for document in read(path)]


def test_txt_is_one_document_byte_for_byte(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes("naïve\r\n字\n".encode())
    assert read(file) == [Document(str(file), "naïve\r\n字\n")]


def test_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfhi")
    assert texts(tmp_path / "a.TXT") == ["hi"]


def test_jsonl(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"text": "one", "x": 1}\n\n{"text": "tw\\no"}\n{"text": ""}\n{"text": "\u2028"}'
    )
    assert read(file) == [
        Document(f"{file}:1", "one"),
        Document(f"{file}:3", "tw\no"),
        Document(f"{file}:5", "\u2028"),
    ]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_over_row_groups(tmp_path: Path, kind: pa.DataType):
    file = tmp_path / "a.parquet"
    rows = [f"row {n}" for n in range(5000)]
    table = pa.table({"id": range(5000), "text": pa.array(rows).cast(kind)})
    pq.write_table(table, file, row_group_size=700)
    documents = read(file)
    assert [document.text for document in documents] == rows
    assert documents[-1].id == f"{file}:5000"


def test_globs_are_sorted_and_cross_folders(tmp_path: Path):
    for name in ["b/2.txt", "a/deep/1.txt", "c.txt", "d.md"]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    assert texts(tmp_path / "**/*.txt") == ["a/deep/1.txt", "b/2.txt", "c.txt"]
    assert texts(tmp_path / "*.txt") == ["c.txt"]


def test_a_file_whose_name_is_a_glob(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("exact")
    (tmp_path / "a1.txt").write_text("matched")
    assert texts(tmp_path / "a[1].txt") == ["exact"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("at home")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/*.txt") == ["at home"]


def test_stdlib():
    source = find_source("stdlib", KEY)
    assert list(source.files) == sorted(source.files)
    assert {file.parent for file in source.files} == {Path(sysconfig.get_path("stdlib"))}
    documents = list(read_documents(source))
    assert len(documents) > 100
    assert any("Guido van Rossum" in document.text for document in documents)
    assert source_digest(source) == source_digest(find_source("stdlib", KEY))


def test_digest_follows_names_sizes_and_times(tmp_path: Path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    digests = set()

    def note() -> None:
        digests.add(source_digest(find_source(f"{tmp_path}/*.txt", KEY)))

    a.write_text("x")
    note()
    a.write_text("xy")
    note()
    os.utime(a, ns=(1, 1))
    note()
    a.rename(b)
    note()
    a.write_text("x")
    note()
    assert len(digests) == 5


def test_documents_are_streamed(write_jsonl: Callable[..., Path]):
    file = write_jsonl([f"text {n}" for n in range(100)])
    stream = read_documents(find_source(str(file), KEY))
    assert next(stream).text == "text 0"
    with file.open("a") as end:
        end.write(json.dumps({"text": "late"}) + "\n")
    assert [document.text for document in stream][-1] == "late"
