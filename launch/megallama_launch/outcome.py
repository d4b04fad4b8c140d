"""How a local run ended, in the words for the user: out of many exits, the one that was first."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megallama_launch.claims import Failure
from megallama_launch.failure import CRASHED, PREEMPTED


@dataclass(frozen=True)
class Exit:
    """A rank that ended by itself or was signalled by somebody else."""

    rank: int
    code: int
    """The exit code; minus the signal's number where one ended the process."""
    time: float
    """time.monotonic() when the parent saw it, in seconds."""


@dataclass(frozen=True)
class Outcome:
    """How a run of several ranks ended."""

    exit_code: int
    """0 done · 1 crashed · 2 user error · 3 diverged · 4 preempted, state saved · 128 + signal."""
    failed_rank: int | None = None
    """The rank that failed first; None where none did, or where all were stopped or hung."""
    message: str = ""
    """One paragraph for the user; empty after success."""
    details: str = ""
    """The traceback of the failed rank, or the stacks of the hung ones."""
    killed: tuple[int, ...] = ()
    """Ranks that did not end by themselves and were killed."""
    outputs: tuple[Path, ...] = field(default=())
    """By rank, the file with its stdout and stderr, where they were captured."""

    @property
    def text(self) -> str:
        """What is shown to the user: the message, then the details."""
        return "\n".join(part.rstrip() for part in (self.message, self.details) if part)


def outcome_of(
    exits: Sequence[Exit],
    killed: Sequence[int],
    claimed: Failure | None,
    stopped_by: signal.Signals | None,
) -> Outcome:
    """Choose what to report from the exits and the failure that a rank left, if any.

    `killed` are the ranks that the parent gave up on.

    The earliest wins: a rank killed by a signal leaves no failure, but its peers' broken
    connections claim later than it died. After a request to stop, exits are answers to it, and
    so are lost connections.
    """
    if stopped_by is not None:
        if claimed is None or claimed.symptom:
            return _stopped(exits, killed, stopped_by)
        return _claimed(claimed)
    bad = min((e for e in exits if e.code), key=lambda e: e.time, default=None)
    if bad is None or (claimed is not None and claimed.time <= bad.time):
        return _claimed(claimed) if claimed else Outcome(0)
    return _unexplained(bad)


def hung_outcome(stacks: Mapping[int, str], timeout_s: float) -> Outcome:
    """The outcome of a run that was ended because these ranks took longer than `timeout_s`."""
    ranks = ", ".join(map(str, sorted(stacks)))
    return Outcome(
        CRASHED,
        message=f"rank{'s' * (len(stacks) > 1)} {ranks} did not finish in {timeout_s:g} s",
        details="\n".join(f"--- rank {rank} ---\n{stacks[rank]}" for rank in sorted(stacks)),
    )


def _claimed(failure: Failure) -> Outcome:
    preempted = failure.exit_code == PREEMPTED
    return Outcome(
        failure.exit_code, None if preempted else failure.rank, failure.message, failure.traceback
    )


def _unexplained(bad: Exit) -> Outcome:
    if bad.code == PREEMPTED:
        return Outcome(PREEMPTED, message="stopped, the state is saved")
    if bad.code > 0:
        return Outcome(bad.code, bad.rank, f"rank {bad.rank} ended with exit code {bad.code}")
    try:
        name = signal.Signals(-bad.code).name
    except ValueError:
        name = f"signal {-bad.code}"
    hint = " (out of memory? see dmesg)" if bad.code == -signal.SIGKILL else ""
    return Outcome(CRASHED, bad.rank, f"rank {bad.rank} was killed by {name}{hint}")


def _stopped(exits: Sequence[Exit], killed: Sequence[int], stopped_by: signal.Signals) -> Outcome:
    codes = {e.code for e in exits}
    if codes == {0} and not killed:
        return Outcome(0)
    if PREEMPTED in codes:
        return Outcome(PREEMPTED, message=f"stopped by {stopped_by.name}, the state is saved")
    return Outcome(128 + stopped_by, message=f"stopped by {stopped_by.name}")
