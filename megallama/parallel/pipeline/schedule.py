"""Pipeline schedules as data: for each rank, the actions it takes, in order. Standard library only.

The same lists are executed by `runtime.py`, priced by the planner, drawn, and property-tested.
Sources: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2021, PipeDream-Flush).
"""

from collections.abc import Callable, Iterator
from enum import StrEnum
from itertools import chain
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does. A message is named by the stage that computes with it."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SEND_ACTIVATION = "send activation"
    RECEIVE_ACTIVATION = "receive activation"
    SEND_GRADIENT = "send gradient"
    RECEIVE_GRADIENT = "receive gradient"


class Action(NamedTuple):
    """One thing a rank does. Receives are posted when reached and awaited by the action that
    computes with the message; sends are started and not awaited.
    """

    kind: Kind
    stage: int
    """The stage that computes; for a message, the one that computes with it."""
    micro_batch: int


RECEIVE_AHEAD = 2
"""How many computations ahead of its use a receive is posted, to overlap the transfer."""


def stage_rank(stage: int, pipeline: int) -> int:
    """The pipeline rank that holds a stage."""
    return stage % pipeline


def gpipe(rank: int, _pipeline: int, micro_batches: int) -> Iterator[Action]:
    """All forwards, then all backwards. In flight: all micro-batches."""
    for m in range(micro_batches):
        yield Action(Kind.FORWARD, rank, m)
    for m in range(micro_batches):
        yield Action(Kind.BACKWARD, rank, m)


def one_forward_one_backward(rank: int, pipeline: int, micro_batches: int) -> Iterator[Action]:
    """1F1B: as many forwards ahead as there are ranks behind, then one forward, one backward.

    In flight on rank r: min(pipeline - r, micro_batches).
    """
    warm_up = min(pipeline - 1 - rank, micro_batches)
    for m in range(warm_up):
        yield Action(Kind.FORWARD, rank, m)
    for m in range(warm_up, micro_batches):
        yield Action(Kind.FORWARD, rank, m)
        yield Action(Kind.BACKWARD, rank, m - warm_up)
    for m in range(micro_batches - warm_up, micro_batches):
        yield Action(Kind.BACKWARD, rank, m)


def forward_only(rank: int, _pipeline: int, micro_batches: int) -> Iterator[Action]:
    """For evaluation."""
    for m in range(micro_batches):
        yield Action(Kind.FORWARD, rank, m)


SCHEDULES: dict[str, Callable[[int, int, int], Iterator[Action]]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "forward_only": forward_only,
}


def actions(name: str, rank: int, pipeline: int, micro_batches: int) -> list[Action]:
    """Everything a rank does in one step, messages included.

    Args:
        name: a key of `SCHEDULES`.
        rank: place on the pipeline axis, 0 … pipeline-1.
        pipeline: ranks on the axis; rank r holds stage r.
        micro_batches: per step, at least 1.

    """
    computations = list(SCHEDULES[name](rank, pipeline, micro_batches))
    needed = [_receive_for(action, pipeline) for action in computations]
    posted = chain.from_iterable(needed[:RECEIVE_AHEAD])
    out = list(posted)
    for k, action in enumerate(computations):
        out += needed[k + RECEIVE_AHEAD] if k + RECEIVE_AHEAD < len(needed) else []
        out.append(action)
        out += _send_after(action, pipeline)
    return out


def _receive_for(action: Action, pipeline: int) -> list[Action]:
    kind, stage, m = action
    if kind == Kind.FORWARD and stage > 0:
        return [Action(Kind.RECEIVE_ACTIVATION, stage, m)]
    if kind == Kind.BACKWARD and stage < pipeline - 1:
        return [Action(Kind.RECEIVE_GRADIENT, stage, m)]
    return []


def _send_after(action: Action, pipeline: int) -> list[Action]:
    kind, stage, m = action
    if kind == Kind.FORWARD and stage < pipeline - 1:
        return [Action(Kind.SEND_ACTIVATION, stage + 1, m)]
    if kind == Kind.BACKWARD and stage > 0:
        return [Action(Kind.SEND_GRADIENT, stage - 1, m)]
    return []
