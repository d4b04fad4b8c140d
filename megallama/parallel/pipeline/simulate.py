"""How long a step takes: schedules run on paper. Standard library only.

For the planner, for pictures and for tests. Ranks compute their actions in order; a message costs
a fixed latency and no rank's time. What posted receives and full channels hold up is not modelled.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megallama.parallel.pipeline.schedule import Action, Kind

COMPUTATIONS = (Kind.FORWARD, Kind.BACKWARD)


class Span(NamedTuple):
    """A computation and when it ran, in the unit of the costs, from the step's start."""

    action: Action
    start: float
    stop: float


def simulate(
    programs: Sequence[Sequence[Action]],
    cost: Callable[[Action], float],
    *,
    latency: float = 0.0,
) -> list[list[Span]]:
    """Run every rank's actions, each as soon as its rank is free and its input is there.

    Args:
        programs: of each pipeline rank, in order; messages in them are passed over.
        cost: time of a forward or backward, in any unit.
        latency: from the end of a computation to its result on another rank, in that unit.

    Returns:
        For each rank its computations in order.

    Raises:
        ValueError: ranks wait for each other for ever; says where.

    """
    todo = [[action for action in program if action.kind in COMPUTATIONS] for program in programs]
    last_stage = max(action.stage for program in todo for action in program)
    spans: list[list[Span]] = [[] for _ in todo]
    stopped: dict[Action, float] = {}
    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(todo):
            for action in program[len(spans[rank]) :]:
                if (source := _input(action, last_stage)) is None:
                    ready = 0.0
                elif source in stopped:
                    ready = stopped[source] + (latency if source.stage != action.stage else 0.0)
                else:
                    break
                start = max(ready, spans[rank][-1].stop if spans[rank] else 0.0)
                stopped[action] = start + cost(action)
                spans[rank].append(Span(action, start, stopped[action]))
                progress = True
    stuck = [
        f"rank {rank} at {program[len(done)].kind} of stage {program[len(done)].stage}, "
        f"micro-batch {program[len(done)].micro_batch}"
        for rank, (program, done) in enumerate(zip(todo, spans, strict=True))
        if len(done) < len(program)
    ]
    if stuck:
        raise ValueError(f"deadlock: {'; '.join(stuck)}")
    return spans


def _input(action: Action, last_stage: int) -> Action | None:
    """The computation whose result an action needs; None for the first stage's forward."""
    kind, stage, m = action
    if kind == Kind.FORWARD:
        return Action(kind, stage - 1, m) if stage > 0 else None
    return Action(kind, stage + 1, m) if stage < last_stage else Action(Kind.FORWARD, stage, m)


def makespan(spans: Sequence[Sequence[Span]]) -> float:
    """When the last rank is done, in the unit of the costs."""
    return max(span.stop for rank in spans for span in rank)


def bubble(spans: Sequence[Sequence[Span]]) -> float:
    """Share of the ranks' time until the last is done that is idle: 0 … 1.

    Papers divide the idle time by the busy time instead: `bubble / (1 - bubble)`, for 1F1B
    (ranks - 1) / (virtual stages · micro-batches).
    """
    busy = sum(span.stop - span.start for rank in spans for span in rank)
    return 1 - busy / (len(spans) * makespan(spans))
