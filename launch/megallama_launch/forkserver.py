"""The process that ranks are forked from: it has imported torch once, and has no threads.

Starting eight ranks then costs eight forks rather than eight imports of torch. The parent never
imports torch itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from megallama_launch.preload import REQUEST

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
)
"""What every rank of ours uses, whatever it runs."""

LONGEST_TMPDIR = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""In bytes: Linux has 107 for a socket's path, and multiprocessing adds these names."""

SHIELDED = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)


def start_forkserver(preload: Sequence[str] = PRELOAD) -> None:
    """Start the forkserver and return at once; it imports `preload` in the background.

    Does nothing where one is already running: its imports cannot change any more.
    """
    # Terminals and batch systems signal whole groups. The forkserver must outlive the ranks, to
    # report how they ended, so it inherits a mask. The tracker is started first because starting
    # it would clear the mask.
    resource_tracker.ensure_running()
    request = json.dumps(
        {"sys_path": [p or str(Path.cwd()) for p in sys.path], "modules": [*preload]}
    )
    forkserver.set_forkserver_preload(["megallama_launch.preload", "megallama_launch.rank"])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    try:
        # One OpenMP thread: a library that starts its pool on import would not survive the fork.
        with _environment({REQUEST: request, "OMP_NUM_THREADS": "1"}), _short_temporary_folder():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def context() -> ForkServerContext:
    """The multiprocessing context whose processes are forked from the forkserver."""
    return multiprocessing.get_context("forkserver")


def start(process: BaseProcess) -> None:
    """Start a process that does not import the caller's `__main__` again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """Batch systems can set a TMPDIR in which the path of a socket becomes too long."""
    before = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
        tempfile.tempdir = "/tmp"
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and restore what was there on the way out."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
