"""The checkpoint folder: what counts as a checkpoint, how one is committed, and which are kept.

    RUN/checkpoints/step-00001000/manifest.json   written last, with digest and size of every file
    RUN/checkpoints/step-00001000/*.distcp, .metadata
    RUN/checkpoints/.step-00002000.partial/       being written; never read, removed later

A checkpoint exists iff its manifest does and every digest holds.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 22
_COMMITTED = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class FileDigest:
    """A file's content, in short."""

    size: int
    """Bytes."""
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Completed optimizer steps."""
    tokens: int
    """Read so far; the data cursor is `step`, since what a step reads follows from its number."""
    layout: dict[str, Any]
    model: dict[str, Any]
    data_fingerprint: str
    global_batch_tokens: int
    files: dict[str, FileDigest]
    format: int = FORMAT


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it is committed."""
    return root / f".step-{step:08d}.partial"


def committed_folder(root: Path, step: int) -> Path:
    """Where a checkpoint of a step stands."""
    return root / f"step-{step:08d}"


def digest_file(path: Path) -> FileDigest:
    """Size and digest of one file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileDigest(size=path.stat().st_size, xxh3_128=digest.hexdigest())


def commit(root: Path, manifest: Manifest) -> Path:
    """Turn the partial folder of the manifest's step into a checkpoint: manifest last, then rename.

    A kill at any moment leaves either no checkpoint of that step or the whole of it.
    """
    partial, final = partial_folder(root, manifest.step), committed_folder(root, manifest.step)
    _write_durably(partial / MANIFEST, json.dumps(asdict(manifest), indent=1))
    _sync_folder(partial)
    if final.exists():  # an unreadable one of the same step: resuming fell back behind it
        _remove(final)
    partial.rename(final)
    _sync_folder(root)
    return final


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, torn, or of another format; the message says which.

    """
    try:
        raw = json.loads((folder / MANIFEST).read_text())
        files = {name: FileDigest(**digest) for name, digest in raw.pop("files").items()}
        manifest = Manifest(**raw, files=files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder.name}: unreadable {MANIFEST}: {error}") from error
    if manifest.format != FORMAT:
        raise ValueError(f"{folder.name}: format {manifest.format}, this version reads {FORMAT}")
    if folder != committed_folder(folder.parent, manifest.step):
        raise ValueError(f"{folder.name}: its manifest is of step {manifest.step}")
    return manifest


def verify_files(folder: Path, files: Mapping[str, FileDigest]) -> None:
    """Read every file and compare.

    Raises:
        ValueError: a file is missing or its content is not what was written.

    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder.name}: {name} is missing")
        if path.stat().st_size != expected.size:
            raise ValueError(
                f"{folder.name}: {name} has {path.stat().st_size} bytes, not {expected.size}"
            )
        if digest_file(path) != expected:
            raise ValueError(f"{folder.name}: the content of {name} has changed")


def list_candidates(root: Path) -> list[tuple[Manifest | None, str]]:
    """Manifests of what may be checkpoints, newest first; for one that has none, None and why."""
    candidates: list[tuple[Manifest | None, str]] = []
    for _, folder in _newest_first(root):
        try:
            candidates.append((read_manifest(folder), ""))
        except ValueError as error:
            candidates.append((None, str(error)))
    return candidates


def reason_against(folder: Path, files: Mapping[str, FileDigest]) -> str | None:
    """Why these files of a checkpoint cannot be trusted; None if they can."""
    try:
        verify_files(folder, files)
    except ValueError as error:
        return str(error)
    except OSError as error:  # a disk that gives a file back no more
        return f"{folder.name}: cannot be read: {error}"
    return None


def newest_valid(
    root: Path,
    listed: Callable[[Path], list[tuple[Manifest | None, str]]] = list_candidates,
    judged: Callable[[Path, Mapping[str, FileDigest]], str | None] = reason_against,
) -> tuple[Manifest | None, list[str]]:
    """The newest whole checkpoint, and why each newer one was passed over.

    `listed` and `judged` are how candidates are found and their files checked: by this process
    alone, or by all ranks together.
    """
    passed_over: list[str] = []
    for manifest, reason in listed(root):
        if manifest is not None:
            fault = judged(committed_folder(root, manifest.step), manifest.files)
            if fault is None:
                return manifest, passed_over
            reason = fault
        passed_over.append(reason)
    return None, passed_over


def remove_partial(root: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for folder in root.glob(".step-*"):
        shutil.rmtree(folder)


def keep_newest(root: Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, the one just committed.

    Newer ones are those that resuming passed over: they must not push out the one just committed.
    """
    folders = [folder for number, folder in _newest_first(root) if number <= step]
    for folder in folders[keep:]:
        _remove(folder)


def _newest_first(root: Path) -> list[tuple[int, Path]]:
    """Steps and folders that are named as checkpoints are; a user's copies are not ours."""
    named = ((_COMMITTED.fullmatch(folder.name), folder) for folder in root.glob("step-*"))
    return sorted(((int(name[1]), folder) for name, folder in named if name), reverse=True)


def _remove(folder: Path) -> None:
    """Rename first, so that a kill half-way cannot leave something that looks like a checkpoint."""
    doomed = folder.parent / f".{folder.name}.removed"
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
