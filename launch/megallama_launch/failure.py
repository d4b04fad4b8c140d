"""What a rank does when its work raises: the first failure is shown, once, and the rest is quiet.

| started by | the claim is made in | the failure is shown by |
|---|---|---|
| `run_local` | the folder of the FileStore | the parent, once all ranks have stopped |
| torchrun | the agent's store | torchrun's summary; the rank itself while restarts are left |
| srun, or nothing | rank 0's store | the rank itself |
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megallama_launch.claims import (
    STORE,
    Failure,
    claim_from_environment,
    claim_in_folder,
    claimed_in_folder,
    granted,
    hosts_store,
)

CRASHED = 1
PREEMPTED = 4
INTERRUPTED = 130
"""What shells use for Ctrl-C."""

HOLD_BACK_S = 1.0
"""How long a lost connection waits for its cause to claim; torchrun ends such ranks meanwhile."""

POLL_S = 0.05

LINGER_S = 2.0
"""How long rank 0 keeps its store up after its own failure, for the others to see the claim."""

_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|closed by peer|broken pipe|socket closed"
    r"|pair closure|failed to recv, got 0 bytes|ncclRemoteError|remote process exited"
    r"|NCCL communicator was aborted",
    re.IGNORECASE,
)


def guard(
    function: Callable[..., int | None],
    *args: object,
    coordinates: Callable[[], str] | None = None,
    claim: Callable[[], bool] | None = None,
) -> int:
    """Run `function(*args)` as the whole work of this rank and return the rank's exit code.

    `coordinates()` says where in the layout the rank stands ("tensor 1 · data 0"); it is asked
    only after a failure and may itself fail. `claim()` says whether this failure is the first;
    left out, the store in the environment is asked. Ranks of `run_local` always claim in its
    folder. Under srun rank 0's store must outlive its process group: a variable of `function` that
    holds the store is enough.

    The code is what `function` returned (None is 0), an exception's `exit_code` (2 the user must
    fix something, 3 diverged, 4 preempted with the state saved), or else 1. An exception with an
    `exit_code` was raised on purpose: it is shown without its traceback. Nothing is raised.
    """
    started = time.time()
    rank = int(os.environ.get("RANK", 0))
    try:
        return function(*args) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            return error.code or 0
        failure = _failure(rank, error, coordinates)
        # still inside: the exception keeps the function's variables alive, its store among them
        _report(failure, claim or (lambda: claim_from_environment(rank, since=started)))
        return failure.exit_code


def leave(exit_code: int) -> NoReturn:
    """End the process now: a broken process group can hang an ordinary interpreter exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _failure(rank: int, error: BaseException, coordinates: Callable[[], str] | None) -> Failure:
    exit_code = getattr(error, "exit_code", None)
    on_purpose = isinstance(exit_code, int) or isinstance(error, SystemExit)
    words = str(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
    symptom = isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))
    verb = "stopped" if exit_code == PREEMPTED else "failed"
    message = f"{_who(rank, coordinates)} {verb}: {words}"
    if symptom:
        message += "\nAnother rank went away first: was a process killed (out of memory: dmesg)?"
    frames = error.__traceback__ and error.__traceback__.tb_next  # without guard's own
    trace = "".join(traceback.format_exception(type(error), error, frames))
    return Failure(
        rank=rank,
        exit_code=exit_code if isinstance(exit_code, int) else CRASHED,
        message=message,
        traceback="" if on_purpose else trace,
        symptom=symptom,
        time=time.monotonic(),
    )


def _who(rank: int, coordinates: Callable[[], str] | None) -> str:
    try:
        place = coordinates() if coordinates else ""
    except Exception:  # the mesh may be what failed
        place = ""
    return f"rank {rank} ({place})" if place else f"rank {rank}"


def _report(failure: Failure, claim: Callable[[], bool]) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save
    folder = Path(os.environ[STORE]).parent if STORE in os.environ else None
    if failure.symptom:
        _hold_back(folder)
    if folder:
        claim_in_folder(folder, dataclasses.replace(failure, time=time.monotonic()))
    elif granted(claim):
        _show(failure)
        if hosts_store(failure.rank):
            time.sleep(LINGER_S)
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:
        time.sleep(HOLD_BACK_S)  # so that torchrun finds the first failure first


def _hold_back(folder: Path | None) -> None:
    """Give the rank that caused this failure the time to claim."""
    until = time.monotonic() + HOLD_BACK_S
    while time.monotonic() < until and not (folder and claimed_in_folder(folder)):
        time.sleep(POLL_S)


def _show(failure: Failure) -> None:
    """Print the failure, or leave it to torchrun where its summary is going to."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        details = {"py_callstack": failure.text, "timestamp": str(int(time.time()))}
        record = {"message": {"message": failure.message, "extraInfo": details}}
        Path(error_file).write_text(json.dumps(record))
    restarts, allowed = (
        int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    if not error_file or restarts < allowed:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(2, f"{failure.text.rstrip()}\n".encode())  # one write: ranks do not interleave
