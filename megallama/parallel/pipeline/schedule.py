"""Pipeline schedules as data: for each rank, the actions it takes, in order. Standard library only.

The same lists are executed by `runtime.py`, priced by the planner, drawn, and property-tested.
Sources: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2021, PipeDream-Flush), interleaved 1F1B
(Narayanan et al. 2021, section 2.2) with the free N of Llama 3 (arXiv 2407.21783, section 3.3.2).
"""

from collections.abc import Callable
from enum import StrEnum
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


class Pipeline(NamedTuple):
    """A rank's place in a pipeline, and what passes through it in one step."""

    rank: int
    """0 … ranks-1; holds stages rank, rank + ranks, rank + 2·ranks …"""
    ranks: int
    virtual_stages: int
    """Stages a rank; together there are ranks · virtual_stages."""
    groups: tuple[int, ...]
    """Micro-batches that pass one virtual stage before the next has its turn: `group_sizes`."""


RECEIVE_AHEAD = 2
"""How many computations ahead of its use a receive is posted, to overlap the transfer."""


def stage_rank(stage: int, pipeline: int) -> int:
    """The pipeline rank that holds a stage."""
    return stage % pipeline


def group_sizes(micro_batches: int, pipeline: int, group: int | None = None) -> tuple[int, ...]:
    """How many micro-batches pass a virtual stage before the rank turns to its next one.

    All are `group` (Llama 3's N) where it divides the micro-batches. Depth first is N = pipeline,
    the default, and breadth first N = micro_batches. What is left over is spread over the groups,
    larger ones first. No group is smaller than the pipeline unless there are no more micro-batches.
    """
    # The first of a group is back at rank 0 after `pipeline` forwards; a smaller group leaves the
    # ranks idle until then. With N below PP = pipeline, or a short last group, the warm-up of
    # interleaved 1F1B can even deadlock: rank 0's forward k needs the last rank's forward k-N.
    # Before that comes the last rank's backward k-N-w-1 (its warm-up is w), which needs rank 0's
    # backward k-2N-w-1. But rank 0, whose warm-up is 2(PP-1) longer, only gets as far as backward
    # k-w-1-2(PP-1) before its forward k: not far enough if N < PP-1.
    groups = max(1, micro_batches // max(group or pipeline, pipeline))
    size, more = divmod(micro_batches, groups)
    return tuple(size + (i < more) for i in range(groups))


def _all_forwards(pipeline: Pipeline) -> int:
    return sum(pipeline.groups) * pipeline.virtual_stages


def _one_per_rank_behind(pipeline: Pipeline) -> int:
    return pipeline.ranks - 1 - pipeline.rank


def _two_per_rank_behind_and_a_group_per_stage(pipeline: Pipeline) -> int:
    # (V-1)N forwards lead the last rank to its last stage. Each rank before it needs two more: a
    # forward and a backward pass between its forward and the backward that comes back from there.
    return 2 * _one_per_rank_behind(pipeline) + (pipeline.virtual_stages - 1) * pipeline.groups[0]


FORWARD_ONLY = "forward_only"
"""The schedule for evaluation."""

SCHEDULES: dict[str, Callable[[Pipeline], int]] = {
    "gpipe": _all_forwards,
    "1f1b": _one_per_rank_behind,
    "interleaved_1f1b": _two_per_rank_behind_and_a_group_per_stage,
    FORWARD_ONLY: _all_forwards,
}
"""Forwards a rank does before its first pair of a forward and a backward, if it has as many. The
order of the forwards among themselves, and of the backwards, is the same on all ranks and in all
schedules, so messages between two ranks are received in the order they are sent."""


def actions(
    name: str,
    rank: int,
    pipeline: int,
    micro_batches: int,
    *,
    virtual_stages: int = 1,
    group: int | None = None,
) -> list[Action]:
    """Everything a rank does in one step, messages included.

    Args:
        name: a key of `SCHEDULES`.
        rank: place on the pipeline axis, 0 … pipeline-1.
        pipeline: ranks on the axis; rank r holds the stages s with s % pipeline == r.
        micro_batches: per step, at least 1.
        virtual_stages: stages a rank, at least 1; above 1 needs two ranks, and not 1f1b.
        group: micro-batches that pass one virtual stage before the next has its turn, Llama 3's N;
            `group_sizes` says what becomes of it.

    Raises:
        ValueError: the schedule has no order for so many virtual stages.

    """
    place = _place(name, rank, pipeline, micro_batches, virtual_stages, group)
    computations = _computations(name, place)
    posted: list[list[Action]] = [[] for _ in computations]
    for k, action in enumerate(computations):
        for receive in _receive_for(action, place):
            posted[max(0, k - _ahead(receive, place))].append(receive)
    out = []
    for receives, action in zip(posted, computations, strict=True):
        out += [*receives, action, *_send_after(action, place)]
    return out


def peak_in_flight(
    name: str,
    rank: int,
    pipeline: int,
    micro_batches: int,
    *,
    virtual_stages: int = 1,
    group: int | None = None,
) -> int:
    """The most forwards (of a stage, for a micro-batch) of a rank that wait for their backward.

    Exact, not a bound: one more than the warm-up, or all there are. Evaluation keeps nothing: 0.
    Arguments and errors are those of `actions`.
    """
    place = _place(name, rank, pipeline, micro_batches, virtual_stages, group)
    return 0 if name == FORWARD_ONLY else min(SCHEDULES[name](place) + 1, _all_forwards(place))


def _place(
    name: str, rank: int, pipeline: int, micro_batches: int, virtual_stages: int, group: int | None
) -> Pipeline:
    if virtual_stages > 1 and (pipeline == 1 or name == "1f1b"):
        raise ValueError(
            f"{name} over {pipeline} ranks has no order for {virtual_stages} stages a rank"
        )
    groups = group_sizes(micro_batches, pipeline, group)
    return Pipeline(rank, pipeline, virtual_stages, groups)


def _computations(name: str, place: Pipeline) -> list[Action]:
    order = _order(place)
    last = place.virtual_stages - 1
    forwards = [Action(Kind.FORWARD, _stage(v, place), m) for v, m in order]
    if name == FORWARD_ONLY:
        return forwards
    backwards = [Action(Kind.BACKWARD, _stage(last - v, place), m) for v, m in order]
    warm_up = min(SCHEDULES[name](place), len(order))
    pairs = zip(forwards[warm_up:], backwards, strict=False)
    steady = [action for pair in pairs for action in pair]
    return [*forwards[:warm_up], *steady, *backwards[len(order) - warm_up :]]


def _order(place: Pipeline) -> list[tuple[int, int]]:
    """(virtual stage, micro-batch) of forwards; backwards count virtual stages from the last."""
    order: list[tuple[int, int]] = []
    first = 0
    for size in place.groups:
        members = range(first, first + size)
        order += [(v, m) for v in range(place.virtual_stages) for m in members]
        first += size
    return order


def _stage(virtual_stage: int, place: Pipeline) -> int:
    return virtual_stage * place.ranks + place.rank


def _ahead(receive: Action, place: Pipeline) -> int:
    """How many computations ahead a receive is posted.

    What goes round the ring, between the last rank and rank 0, waits there until its group is
    through: N - ranks micro-batches, a forward and a backward each. A receive is posted when its
    message comes, not when it is used. Else a sender that waits for it holds up the ring.
    """
    entry = {Kind.RECEIVE_ACTIVATION: 0, Kind.RECEIVE_GRADIENT: place.ranks - 1}[receive.kind]
    waits = max(0, place.groups[0] - place.ranks) if place.rank == entry else 0
    return RECEIVE_AHEAD + 2 * waits


def _receive_for(action: Action, place: Pipeline) -> list[Action]:
    kind, stage, m = action
    if kind == Kind.FORWARD and stage > 0:
        return [Action(Kind.RECEIVE_ACTIVATION, stage, m)]
    if kind == Kind.BACKWARD and stage < _last_stage(place):
        return [Action(Kind.RECEIVE_GRADIENT, stage, m)]
    return []


def _send_after(action: Action, place: Pipeline) -> list[Action]:
    kind, stage, m = action
    if kind == Kind.FORWARD and stage < _last_stage(place):
        return [Action(Kind.SEND_ACTIVATION, stage + 1, m)]
    if kind == Kind.BACKWARD and stage > 0:
        return [Action(Kind.SEND_GRADIENT, stage - 1, m)]
    return []


def _last_stage(place: Pipeline) -> int:
    return place.ranks * place.virtual_stages - 1
