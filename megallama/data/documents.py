"""Documents from .txt, .jsonl and .parquet files, or from Python's own standard library."""

from __future__ import annotations

import glob
import json
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megallama.config.errors import UserError

STDLIB = "stdlib"


@dataclass(frozen=True)
class Document:
    """One text. `id` says where it stands: `file`, `file:line` or `file:row`, counted from 1."""

    id: str
    text: str


@dataclass(frozen=True)
class Source:
    """The files behind one entry of `data.sources`, sorted; `key` is the YAML key of its path."""

    path: str
    key: str
    files: tuple[Path, ...]


def find_source(path: str, key: str) -> Source:
    """Resolve a file, a glob (`**` crosses folders) or `stdlib`.

    Raises UserError naming `key`: nothing matches, a folder, an unknown extension, no permission.
    """
    if path == STDLIB:
        return Source(path, key, _stdlib_files(key))
    pattern = os.path.expanduser(path)  # noqa: PTH111 - a glob is not yet a path
    # A name that exists is taken as it is, even where it holds `[` or `*`.
    names = [pattern] if _exists(pattern, key) else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    files = tuple(Path(name) for name in names if not Path(name).is_dir())
    if names and not files:
        raise UserError.one(
            key, f"{path!r} is a folder: name its files with a glob such as '{names[0]}/**/*.jsonl'"
        )
    if not files:
        raise UserError.one(
            key,
            f"no readable file matches {path!r}, seen from {Path.cwd()}: correct the path",
        )
    for file in files:
        if file.suffix.lower() not in READERS:
            known = ", ".join(READERS)
            raise UserError.one(
                key, f"{file} is none of {known}: convert it, or narrow the glob to one of these"
            )
    return Source(path, key, files)


def read_documents(source: Source) -> Iterator[Document]:
    """Stream the documents in file order; those without any text are left out.

    Raises UserError naming the source's key and the place: unreadable or corrupt files, text that
    is missing or not UTF-8, and no text at all.
    """
    found = False
    for file in source.files:
        for document in READERS.get(file.suffix.lower(), _read_text)(file, source.key):
            if document.text:
                found = True
                yield document
    if not found:
        raise UserError.one(
            source.key, f"{source.path!r} holds no text ({len(source.files)} empty files)"
        )


def source_digest(source: Source) -> str:
    """Hash that changes when documents may have: names, sizes and times; for stdlib the content.

    Content, because a Python installation's file times differ between machines of one image.
    Raises UserError when a file has gone or may not be read.
    """
    digest = xxhash.xxh3_128()
    for file in source.files:
        if source.path == STDLIB:
            digest.update(file.name.encode() + b"\0" + _read_bytes(file, source.key))
        else:
            try:
                status = file.stat()
            except OSError as error:
                raise _unreadable(file, error, source.key) from error
            record = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0"
            digest.update(os.fsencode(record))
    return digest.hexdigest()


def _stdlib_files(key: str) -> tuple[Path, ...]:
    folder = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata is written when Python is built and holds that machine's paths.
    files = (f for f in folder.glob("*.py") if not f.name.startswith("_sysconfigdata"))
    found = tuple(sorted(files))
    if not found:
        raise UserError.one(
            key, f"this Python keeps no source files in {folder}: name files of your own"
        )
    return found


def _read_text(file: Path, key: str) -> Iterator[Document]:
    yield Document(str(file), _decode(_read_bytes(file, key), str(file), key))


def _read_jsonl(file: Path, key: str) -> Iterator[Document]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_document(line, f"{file}:{number}", key)
    except OSError as error:
        raise _unreadable(file, error, key) from error


def _json_document(line: bytes, place: str, key: str) -> Document:
    try:
        record = json.loads(_decode(line, place, key))
    except (ValueError, RecursionError) as error:
        raise UserError.one(key, f"{place} is not JSON ({error}): correct or remove it") from error
    if not isinstance(record, dict) or "text" not in record:
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError.one(key, f"{place} has no field 'text' (it has: {has}): rename or add it")
    text = record["text"]
    if not isinstance(text, str):
        raise UserError.one(
            key, f"{place}: 'text' is {type(text).__name__}, not a string: correct or remove it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError.one(
            key, f"{place}: 'text' is not Unicode ({error}): correct or remove it"
        ) from error
    return Document(place, text)


def _read_parquet(file: Path, key: str) -> Iterator[Document]:
    # Slow to import, and most runs never see a parquet file.
    import pyarrow as pa
    import pyarrow.parquet as pq

    strings = (pa.string(), pa.large_string(), pa.string_view())
    row = 0
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            columns = table.schema_arrow
            if "text" not in columns.names:
                has = ", ".join(columns.names)
                raise UserError.one(key, f"{file} has no column 'text' (it has: {has}): rename one")
            kind = columns.field("text").type
            if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in strings:
                raise UserError.one(key, f"{file}: column 'text' holds {kind}, not strings")
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0):
                    row += 1
                    yield _parquet_document(text.as_py(), f"{file}:{row}", key)
    except pa.ArrowException as error:
        raise UserError.one(
            key, f"{file} is not a sound parquet file ({error}): write it again"
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{file}:{row}", error, key) from error
    except OSError as error:
        raise _unreadable(file, error, key) from error


def _parquet_document(text: str | None, place: str, key: str) -> Document:
    if text is None:
        raise UserError.one(key, f"{place}: 'text' is null, not a string: correct or remove it")
    return Document(place, text)


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _exists(path: str, key: str) -> bool:
    """Whether `path` is a file or folder. One behind a closed folder is an error, not a no."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except PermissionError as error:
        raise _unreadable(Path(path), error, key) from error
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _read_bytes(file: Path, key: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error, key) from error


def _decode(data: bytes, place: str, key: str) -> str:
    try:
        return data.decode("utf-8-sig")  # editors on Windows put a byte-order mark first
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error, key) from error


def _not_utf8(place: str, error: UnicodeDecodeError, key: str) -> UserError:
    return UserError.one(
        key, f"{place} is not UTF-8 ({error.reason} at byte {error.start}): convert it"
    )


def _unreadable(file: Path, error: OSError, key: str) -> UserError:
    return UserError.one(key, f"{file} cannot be read ({error.strerror or error}): correct it")
