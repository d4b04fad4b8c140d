"""Tokenized shards in a cache folder: built once, by one process, and complete or absent.

A shard is a folder for one source, tokenizer and held-out share:

    train.tokens, held_out.tokens   uint16 or uint32: BOS text EOS, document after document
    train.ends, held_out.ends       uint64 [documents]: where each document ends, in tokens
    manifest.json                   counts and digests, written last

It is written beside its place and renamed into it, so that a crash leaves no half shard.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megallama.config.errors import UserError
from megallama.data.documents import Source, read_documents, source_digest
from megallama.data.tokenizer import Tokenizer
from megallama.data.writer import SPLITS, flush, write_splits

FORMAT = 1
MANIFEST = "manifest.json"
KEY = "data.cache"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Documents as one packed stream.

    tokens: uint16 or uint32 [tokens]; ends: uint64 [documents], cumulative; text_bytes: UTF-8 bytes
    of the documents; digest: hash of the tokens.
    """

    tokens: np.ndarray
    ends: np.ndarray
    text_bytes: int
    digest: str


@dataclass(frozen=True)
class Shard:
    """One source's documents: those to train on, and those kept for evaluation."""

    train: Split
    held_out: Split


def cache_folder(configured: str | None) -> Path:
    """`data.cache`, else $MEGALLAMA_CACHE, else ~/.cache/megallama.

    Raises UserError naming data.cache where there is no home folder to put it in.
    """
    name = configured or os.environ.get("MEGALLAMA_CACHE") or "~/.cache/megallama"
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError.one(KEY, f"{name!r}: {error} Give the path of a folder") from error


def open_shard(source: Source, tokenizer: Tokenizer, held_out: float, cache: Path) -> Shard:
    """Open a source's shard, after building it if it is missing, damaged or out of date.

    Processes that call at once agree: the first builds, the others wait for it. Raises UserError
    naming the source's key (see read_documents), or data.cache if the folder cannot be used.
    """
    parts = (FORMAT, source_digest(source), tokenizer.digest, held_out)
    key = xxhash.xxh3_64_hexdigest("\0".join(map(str, parts)).encode())
    label = re.sub(r"[^\w.-]+", "-", Path(source.path).name)[:40]
    folder = cache / f"{label}-{key}"
    try:
        shard = _map_shard(folder)
        if shard is not None:
            return shard
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if _map_shard(folder) is None:
                _build(source, tokenizer, held_out, folder)
            shard = _map_shard(folder)
        if shard is None:
            raise OSError(f"{folder} was changed while it was opened")
        return shard
    except OSError as error:
        raise UserError.one(
            KEY, f"{cache} cannot keep tokenized shards ({error}): give a folder that can"
        ) from error


def _map_shard(folder: Path) -> Shard | None:
    """The shard, or None if it is absent or its files do not have the sizes its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return Shard(*(_map_split(folder, name, manifest) for name in SPLITS))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _map_split(folder: Path, name: str, manifest: dict[str, Any]) -> Split:
    counts = manifest["splits"][name]
    return Split(
        tokens=_map_array(folder / f"{name}.tokens", manifest["dtype"], counts["tokens"]),
        ends=_map_array(folder / f"{name}.ends", "uint64", counts["documents"]),
        text_bytes=counts["bytes"],
        digest=counts["digest"],
    )


def _map_array(file: Path, dtype: str, length: int) -> np.ndarray:
    size, wanted = file.stat().st_size, length * np.dtype(dtype).itemsize
    if size != wanted:
        raise ValueError(f"{file} has {size} bytes instead of {wanted}")
    if length == 0:
        return np.empty(0, dtype)  # no file of 0 bytes can be mapped
    return np.memmap(file, dtype, mode="r", shape=(length,))


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel releases it with the process, however that ends."""
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process to finish %s", file.with_suffix(""))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(source: Source, tokenizer: Tokenizer, held_out: float, folder: Path) -> None:
    if folder.exists():
        log.warning("%s is damaged and is built again", folder)
    log.info("tokenizing %s (%d files) into %s", source.path, len(source.files), folder)
    # One name per machine: under the lock, whatever stands there was left by a process that died.
    temporary = folder.with_name(f"{folder.name}.{socket.gethostname()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        dtype = "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"
        manifest = {
            "format": FORMAT,
            "source": source.path,
            "tokenizer": tokenizer.name,
            "vocab": tokenizer.vocab,
            "share_held_out": held_out,
            "dtype": dtype,
            "splits": write_splits(read_documents(source), tokenizer, held_out, temporary, dtype),
        }
        with (temporary / MANIFEST).open("wb") as file:
            file.write(json.dumps(manifest, indent=2).encode())
            flush(file)
        # Where a network file system's locks stop at one machine, another may have been faster.
        if _map_shard(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
