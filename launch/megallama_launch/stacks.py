"""Where hung ranks are: the parent asks by a signal, each rank writes its stacks to a file."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

DUMP_SIGNAL = signal.SIGUSR2
"""SLURM's advance notice is SIGUSR1 by custom, so that one stays free for the trainer."""

WAIT_S = 2.0
QUIET_S = 0.1


def write_stacks_on_signal(file: Path) -> None:
    """From now on DUMP_SIGNAL appends the stacks of all threads to `file`, even inside C code."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    faulthandler.register(DUMP_SIGNAL, file=descriptor, all_threads=True)


def ask_for_stacks(ranks: Mapping[int, tuple[int, Path]]) -> dict[int, str]:
    """Stacks of each rank, from {rank: (pid, its file)}; takes at most WAIT_S seconds.

    A rank that cannot answer (stopped, or inside the kernel) gets a line that says so.
    """
    for pid, _ in ranks.values():
        with suppress(ProcessLookupError):
            os.kill(pid, DUMP_SIGNAL)
    give_up = time.monotonic() + WAIT_S
    sizes: list[int] = []
    while time.monotonic() < give_up:
        before, sizes = sizes, [_size(file) for _, file in ranks.values()]
        if all(sizes) and sizes == before:
            break
        time.sleep(QUIET_S)
    return {
        rank: file.read_text() if _size(file) else "no answer: stopped, or inside a system call\n"
        for rank, (_, file) in ranks.items()
    }


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
