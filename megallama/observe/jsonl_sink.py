"""The observer that writes `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from megallama.observe.jsonl import append, encode, open_append
from megallama.observe.record import EvalRecord, RunInfo, StepRecord


class JsonlSink:
    """Appends to `metrics.jsonl`; while it cannot, keeps the lines and tries again every step.

    It says so when that begins and when it ends.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._fd: int | None = None
        self._waiting: list[bytes] = []
        self._failing = False

    def start(self, info: RunInfo) -> None:
        """Nothing to do: the first line opens the file."""

    def step(self, record: StepRecord) -> None:
        """Append a line."""
        self._waiting.append(encode("step", record))
        self._write()

    def evaluation(self, record: EvalRecord) -> None:
        """Append a line."""
        self._waiting.append(encode("eval", record))
        self._write()

    def message(self, text: str) -> None:
        """Messages are for people: nothing to do."""

    def close(self, ok: bool) -> None:  # noqa: ARG002
        """Try a last time to write what is waiting."""
        if self._waiting:
            self._write()
        if self._waiting:
            self._say(
                f"!!! {len(self._waiting)} lines of {self._path} are LOST: it never took them"
            )
        self._release()

    def _write(self) -> None:
        try:
            if self._fd is None:
                self._fd = open_append(self._path)
            append(self._fd, b"".join(self._waiting))
        except OSError as error:
            self._release()
            if not self._failing:
                self._say(
                    f"!!! CANNOT WRITE {self._path}: {error.strerror or error}. Training goes on; "
                    "lines are kept in memory and written once this is mended"
                )
            self._failing = True
            return
        if self._failing:
            self._say(f"{self._path} is written again; no line is missing")
        self._failing = False
        self._waiting.clear()

    def _release(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):  # a network file system may complain once more
                os.close(self._fd)
            self._fd = None
