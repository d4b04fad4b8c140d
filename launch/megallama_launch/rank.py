"""What a process started by `run_local` does before and after the function it runs."""

from __future__ import annotations

import faulthandler
import fcntl
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from megallama_launch.failure import guard, leave
from megallama_launch.stacks import write_stacks_on_signal


@dataclass(frozen=True)
class OpenFile:
    """A file descriptor of the parent that arrives as an open one in the rank."""

    descriptor: int

    def __reduce__(self) -> tuple[Callable[[Any], OpenFile], tuple[Any]]:
        return _arrived, (reduction.DupFd(self.descriptor),)


def _arrived(duplicate: Any) -> OpenFile:
    return OpenFile(duplicate.detach())


def rank_main(
    target: str,
    args: tuple[object, ...],
    environment: Mapping[str, str],
    stacks: Path,
    out: OpenFile,
    err: OpenFile,
) -> None:
    """Run `module:function` with `args`; a failure ends the process with its exit code.

    The environment is the parent's of now, not the forkserver's of when it started.
    """
    os.setpgid(0, 0)
    _die_with_parent()
    _take_streams(out.descriptor, err.descriptor)
    os.environ.clear()
    os.environ.update(environment)
    write_stacks_on_signal(stacks)
    faulthandler.enable()
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # may write although not the foreground group
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the forkserver had them blocked
    if code := guard(_run, target, args):
        leave(code)


def _run(target: str, args: tuple[object, ...]) -> int | None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # it read the variable long ago
    module, _, function = target.partition(":")
    run: Callable[..., int | None] = getattr(importlib.import_module(module), function)
    return run(*args)


def _die_with_parent() -> None:
    """Have the kernel kill this process group when the parent is gone, however it went.

    Only the parent holds the other end of the pipe. A thread that watched it could be kept from
    running by C code that holds the interpreter lock; a death signal would be the forkserver's.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
    if not parent.is_alive():
        os._exit(1)


def _take_streams(out: int, err: int) -> None:
    for descriptor, number, stream in ((out, 1, sys.stdout), (err, 2, sys.stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)
        # Whole lines, so that those of several ranks do not mix, even with PYTHONUNBUFFERED.
        stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
