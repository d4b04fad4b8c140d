"""Writes documents as the token files of a shard; `shards.py` says what the files hold."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from megallama.data.documents import Document
from megallama.data.tokenizer import Tokenizer, cut_pieces

SPLITS = ("train", "held_out")
PIECE = 1 << 18  # characters: bounds what one encoding keeps in memory
ENCODED_AT_ONCE = 1 << 21  # characters: enough pieces for every core
REPORT_EVERY = 10.0  # seconds

log = logging.getLogger(__name__)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is kept for evaluation.

    Only its text decides: copies of a document stay together, and moving files or adding others
    changes nothing. A larger share keeps what a smaller one kept.
    """
    return xxhash.xxh3_64_intdigest(text.encode()) < share * 2**64


def write_splits(
    documents: Iterable[Document], tokenizer: Tokenizer, held_out: float, folder: Path, dtype: str
) -> dict[str, dict[str, int | str]]:
    """Write both splits into `folder`, onto the disk; returns their counts for the manifest."""
    reported = time.monotonic()
    with ExitStack() as stack:
        writers = {name: stack.enter_context(_SplitWriter(folder, name, dtype)) for name in SPLITS}
        for batch in _batches(_cut_documents(documents, held_out)):
            encoded = tokenizer.encode([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                start = [tokenizer.bos] if piece.first else []
                end = [tokenizer.eos] if piece.last else []
                writers[piece.split].add(start + ids + end, piece)
            if time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                done = sum(writer.bytes for writer in writers.values())
                log.info("tokenized %.0f MB", done / 1e6)
        return {name: writer.finish() for name, writer in writers.items()}


def flush(file: BinaryIO) -> None:
    """Onto the disk, so that a power cut after the shard's rename cannot empty the file."""
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class _Piece:
    text: str
    split: str
    first: bool
    last: bool


def _cut_documents(documents: Iterable[Document], held_out: float) -> Iterator[_Piece]:
    for document in documents:
        split = "held_out" if is_held_out(document.text, held_out) else "train"
        texts = list(cut_pieces(document.text, PIECE))
        for n, text in enumerate(texts):
            yield _Piece(text, split, first=n == 0, last=n == len(texts) - 1)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= ENCODED_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to a split's two files."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.tokens_file: BinaryIO = (folder / f"{name}.tokens").open("wb")
        self.ends_file: BinaryIO = (folder / f"{name}.ends").open("wb")
        self.dtype = dtype
        self.hash = xxhash.xxh3_128()
        self.tokens = self.documents = self.bytes = 0

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.tokens_file.close()
        self.ends_file.close()

    def add(self, ids: list[int], piece: _Piece) -> None:
        data = np.array(ids, self.dtype).tobytes()
        self.tokens_file.write(data)
        self.hash.update(data)
        self.tokens += len(ids)
        self.bytes += len(piece.text.encode())
        if piece.last:
            self.documents += 1
            self.ends_file.write(np.uint64(self.tokens).tobytes())

    def finish(self) -> dict[str, int | str]:
        flush(self.tokens_file)
        flush(self.ends_file)
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "digest": self.hash.hexdigest(),
        }
