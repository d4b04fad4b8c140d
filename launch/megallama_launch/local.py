"""Starts N ranks on this machine, waits for all of them, and says how it ended."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from megallama_launch.claims import STORE, claimed_in_folder
from megallama_launch.failure import PREEMPTED
from megallama_launch.forkserver import PRELOAD, context, start, start_forkserver
from megallama_launch.outcome import Exit, Outcome, hung_outcome, outcome_of
from megallama_launch.rank import OpenFile, rank_main
from megallama_launch.stacks import ask_for_stacks

PEER_GRACE_S = 1.5
"""How long the others may take to end after the first failure, often stuck in a collective."""

UNKILLABLE_S = 5.0
"""How long to wait for a killed rank, in seconds: a driver can hold it inside the kernel."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class _Watched:
    """What the parent saw: which ranks ended, which had not, and why it stopped waiting."""

    exits: Sequence[Exit]
    left: Sequence[int]
    stopped_by: signal.Signals | None
    timed_out: bool


def run_local(
    target: str,
    world_size: int,
    args: tuple[object, ...] = (),
    *,
    threads: int | None = None,
    preload: Sequence[str] = PRELOAD,
    env: Mapping[str, str] = {},
    timeout_s: float | None = None,
    grace_s: float = 30.0,
    capture: bool = False,
) -> Outcome:
    """Run `target` ("module:function") with `args` (picklable) in `world_size` processes; wait.

    The ranks have torchrun's environment variables and MEGALLAMA_STORE, the path for a FileStore;
    `env` comes on top. They print to this process's stdout and stderr. `threads` is what each may
    compute with; left out, it is $OMP_NUM_THREADS, or else the cores are shared out. `preload`
    counts in the first call only: one forkserver serves all.

    The function's result is the rank's exit code (None is 0). After a first failure the others
    get PEER_GRACE_S seconds, then are killed; the failure is printed to stderr once. On Ctrl-C,
    SIGTERM or SIGHUP the ranks get SIGTERM and `grace_s` seconds to save what they have; a second
    signal kills them. Ranks that run longer than `timeout_s` seconds are asked for their stacks,
    then killed. When this returns, and also when this process is killed, no rank is left.

    With `capture` nothing is printed, and each rank writes into a file of `Outcome.outputs`,
    whose folder is the caller's to remove.
    """
    folder = Path(tempfile.mkdtemp(prefix="megallama-ranks-"))
    outputs = tuple(folder / f"rank-{rank}.txt" for rank in range(world_size)) if capture else ()
    stacks = [folder / f"stacks-{rank}" for rank in range(world_size)]
    shared = _shared_environment(folder, world_size, threads)
    processes: list[BaseProcess] = []
    try:
        start_forkserver(preload)
        with ExitStack() as files:
            for rank in range(world_size):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                out, err = 1, 2
                if capture:
                    out = err = files.enter_context(outputs[rank].open("wb")).fileno()
                streams = OpenFile(out), OpenFile(err)
                process = context().Process(
                    target=rank_main,
                    name=f"rank {rank}",
                    args=(target, args, shared | own | dict(env), stacks[rank], *streams),
                )
                processes.append(process)
                start(process)
        watched = _watch(processes, timeout_s, grace_s)
        if timeout_s is not None and watched.timed_out:
            hung = {rank: (_pid(processes[rank]), stacks[rank]) for rank in watched.left}
            outcome = hung_outcome(ask_for_stacks(hung), timeout_s)
        else:
            claimed = claimed_in_folder(folder)
            outcome = outcome_of(watched.exits, watched.left, claimed, watched.stopped_by)
        outcome = dataclasses.replace(outcome, killed=tuple(watched.left), outputs=outputs)
    except KeyboardInterrupt:  # while starting; _watch has its own handler
        outcome = Outcome(128 + signal.SIGINT, message="stopped by SIGINT", outputs=outputs)
    finally:
        _kill(processes)
        if not capture:
            shutil.rmtree(folder, ignore_errors=True)
    if outcome.text and not capture:
        sys.stderr.write(f"{outcome.text}\n")
    return outcome


def _shared_environment(folder: Path, world_size: int, threads: int | None) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    return os.environ | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        STORE: str(folder / "store"),
        "OMP_NUM_THREADS": str(
            threads or os.environ.get("OMP_NUM_THREADS") or max(1, cores // world_size)
        ),
        # gloo would look the host's name up, which laptops often cannot resolve
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _watch(processes: Sequence[BaseProcess], timeout_s: float | None, grace_s: float) -> _Watched:
    """Wait until all ranks have ended or there is no reason to wait any longer."""
    exits: list[Exit] = []
    stopped_by: signal.Signals | None = None
    failed = False
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    live = {process.sentinel: rank for rank, process in enumerate(processes)}
    with _stop_requests() as requests:
        while live and (left := deadline - time.monotonic()) > 0:
            for ready in wait([*live, requests], None if left == math.inf else left):
                now = time.monotonic()
                if ready == requests:
                    again = stopped_by is not None
                    stopped_by = signal.Signals(os.read(requests, 1)[0])
                    deadline = now if again else now + grace_s
                    for rank in live.values():
                        _send(processes[rank], signal.SIGTERM)
                elif isinstance(ready, int):
                    rank = live.pop(ready)
                    processes[rank].join()
                    code = processes[rank].exitcode or 0
                    exits.append(Exit(rank, code, now))
                    if code and stopped_by is None:
                        failed = True
                        grace = grace_s if code == PREEMPTED else PEER_GRACE_S
                        deadline = min(deadline, now + grace)
    timed_out = bool(live) and not (failed or stopped_by)
    return _Watched(exits, sorted(live.values()), stopped_by, timed_out)


@contextmanager
def _stop_requests() -> Iterator[int]:
    """A file descriptor that yields one byte, the number, for each signal that asks to stop.

    Signals that are ignored stay so (nohup, shell jobs in the background). Outside of the main
    thread nothing can be installed and nothing arrives.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def note(signum: int, _: FrameType | None) -> None:
        os.write(writer, bytes([signum]))

    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                before[signum] = signal.signal(signum, note)
    try:
        yield reader
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(reader)
        os.close(writer)


def _send(process: BaseProcess, signum: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(_pid(process), signum)


def _pid(process: BaseProcess) -> int:
    assert process.pid is not None, "not started"  # 0 would mean this whole process group
    return process.pid


def _kill(processes: Sequence[BaseProcess]) -> None:
    """Kill what is left of the ranks and of what they started."""
    started = [p for p in processes if p.pid is not None]  # the others end with their pipe
    for process in started:
        try:
            os.killpg(_pid(process), signal.SIGKILL)
        except ProcessLookupError:  # ended, or not yet leader of its group
            if process.is_alive():
                _send(process, signal.SIGKILL)
    for process in started:
        process.join(UNKILLABLE_S)
