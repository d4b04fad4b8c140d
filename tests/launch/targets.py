"""What ranks run in these tests. Nothing here imports torch unless the rank needs it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from megallama_launch.failure import guard, leave


class DivergedError(Exception):
    exit_code = 3


class PreemptedError(Exception):
    exit_code = 4


def write_environment(folder: Path) -> None:
    seen = dict(os.environ, group=str(os.getpgrp() == os.getpid()))
    (folder / os.environ["RANK"]).write_text(json.dumps(seen))


def write_threads(folder: Path) -> None:
    import torch

    (folder / os.environ["RANK"]).write_text(str(torch.get_num_threads()))


def say(text: str) -> None:
    print(f"{text} from {os.environ['RANK']}")
    print("and to stderr", file=sys.stderr)


def exit_with(codes: dict[int, int]) -> int:
    return codes.get(int(os.environ["RANK"]), 0)


def sys_exit(code: object) -> None:
    sys.exit(code)  # type: ignore[arg-type]


def raise_by_name(name: str) -> None:
    raise {"diverged": DivergedError, "preempted": PreemptedError}[name]("loss is nan at step 7")


def die_by(signum: int, victim: int) -> None:
    """The victim dies, the others block in an all-reduce."""
    all_reduce = _group()
    if int(os.environ["RANK"]) == victim:
        os.kill(os.getpid(), signum)
    all_reduce()


def die_by_sigkill(victim: int) -> int:
    return guard(die_by, signal.SIGKILL, victim)


def fail_in(victim: int) -> int:
    """The victim raises, the others block in an all-reduce; the trainer's own guard is inside."""
    return guard(_fail_in, victim, coordinates=_coordinates)


def _fail_in(victim: int) -> None:
    all_reduce = _group()
    all_reduce()
    if int(os.environ["RANK"]) == victim:
        raise ValueError("the answer is 42")
    all_reduce()


def fail_after_leaving_the_group(victim: int) -> int:
    """The others' connections break before the victim comes to claim."""
    return guard(_fail_after_leaving_the_group, victim, coordinates=_coordinates)


def _fail_after_leaving_the_group(victim: int) -> None:
    import torch.distributed

    all_reduce = _group()
    try:
        all_reduce()
        if int(os.environ["RANK"]) == victim:
            raise ValueError("the answer is 42")
        all_reduce()
    finally:
        torch.distributed.destroy_process_group()
        if int(os.environ["RANK"]) == victim:
            time.sleep(0.3)


def fail_one_before_the_others(victim: int) -> int:
    """Nobody's failure is a consequence of another's, but one is the first."""
    return guard(_fail_one_before_the_others, victim, coordinates=_coordinates)


def _fail_one_before_the_others(victim: int) -> None:
    all_reduce = _group()
    all_reduce()
    if int(os.environ["RANK"]) != victim:
        time.sleep(0.05)
    raise ValueError("the answer is 42")


def fail_while_others_sleep(victim: int) -> None:
    if int(os.environ["RANK"]) == victim:
        raise ValueError("the answer is 42")
    time.sleep(600)


def fail_everywhere() -> int:
    return guard(_raise_value_error, coordinates=_coordinates)


def _raise_value_error() -> None:
    raise ValueError("the answer is 42")


def _coordinates() -> str:
    rank = int(os.environ["RANK"])
    return f"tensor {rank % 2} · data {rank // 2}"


def _group() -> Callable[[], object]:
    """Join all ranks by what the environment offers; the result is an all-reduce."""
    import torch
    import torch.distributed as dist

    path = os.environ.get("MEGALLAMA_STORE")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = dist.rendezvous(f"file://{path}" if path else "env://", rank, world_size)
    store, *_ = next(meeting)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)

    def all_reduce(kept: object = store) -> None:
        dist.all_reduce(torch.ones(1))

    return all_reduce


def hang_in(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        _a_place_to_hang()


def _a_place_to_hang() -> None:
    time.sleep(600)


def sleep_with_a_child(folder: Path) -> None:
    """Leave the process ids of this rank and of a process that it started."""
    child = subprocess.Popen(["sleep", "600"])
    _announce(folder, f"{os.getpid()} {child.pid}")
    time.sleep(600)


def hold_the_interpreter(folder: Path) -> None:
    """Block in C code that keeps the interpreter lock, so no thread of this rank can run."""
    import ctypes

    _announce(folder, str(os.getpid()))
    ctypes.PyDLL(None).sleep(600)


def save_on_sigterm(folder: Path, exit_code: int) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _: asked.append(signum))
    _announce(folder, str(os.getpid()))
    while not asked:
        time.sleep(0.02)
    return exit_code


def ignore_sigterm(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _announce(folder, str(os.getpid()))
    time.sleep(600)


def _announce(folder: Path, text: str) -> None:
    draft = folder / f"draft-{os.environ['RANK']}"
    draft.write_text(text)
    draft.rename(folder / f"pids-{os.environ['RANK']}")


def say_terminal(_: Path) -> None:
    print(sys.stdout.isatty(), sys.stderr.isatty())


def under_srun(target: str, *args: object) -> int:
    """Run a target of this file with what SLURM gives: ranks and rank 0's address, no folder."""
    del os.environ["MEGALLAMA_STORE"]
    result: int = globals()[target](*args)
    return result


def fail_before_meeting(victims: list[int]) -> int:
    """Fail before there is any store, as a user's error does."""
    return guard(_fail_before_meeting, victims)


def _fail_before_meeting(victims: list[int]) -> None:
    if int(os.environ["RANK"]) in victims:
        raise ValueError("the answer is 42")


if __name__ == "__main__":  # as torchrun and srun start a rank: targets.py FUNCTION RANK
    leave(globals()[sys.argv[1]](*map(int, sys.argv[2:])))
