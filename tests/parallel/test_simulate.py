"""Schedules run on paper, against times worked out by hand."""

import subprocess
import sys

import pytest

from megallama.parallel.pipeline.schedule import Action, Kind, actions
from megallama.parallel.pipeline.simulate import Span, bubble, makespan, simulate


def programs(name: str, pipeline: int, micro_batches: int, **more: int) -> list[list[Action]]:
    return [actions(name, rank, pipeline, micro_batches, **more) for rank in range(pipeline)]


def cost(action: Action) -> float:
    return {Kind.FORWARD: 1, Kind.BACKWARD: 2}[action.kind]


def test_two_ranks_two_micro_batches():
    """Rank 0: F0 F1 . . B0 . B1, rank 1: . F0 B0 B0 F1 B1 B1."""
    spans = simulate(programs("1f1b", 2, 2), cost)
    times = [[(str(a.kind), a.micro_batch, start, stop) for a, start, stop in row] for row in spans]
    assert times == [
        [("forward", 0, 0, 1), ("forward", 1, 1, 2), ("backward", 0, 4, 6), ("backward", 1, 7, 9)],
        [("forward", 0, 1, 2), ("backward", 0, 2, 4), ("forward", 1, 4, 5), ("backward", 1, 5, 7)],
    ]
    assert makespan(spans) == 9
    assert bubble(spans) == pytest.approx(6 / 18)


def test_latency_counts_once_a_message():
    """One micro-batch: it passes 4 stages there and back, over 3 borders."""
    alone = simulate(programs("1f1b", 4, 1), cost, latency=0.25)
    assert makespan(alone) == 4 * 3 + 6 * 0.25


def test_a_larger_group_hides_latency():
    """Llama 3, section 3.3.2: depth first has the least in flight, breadth first waits least."""
    took = [
        makespan(
            simulate(
                programs("interleaved_1f1b", 4, 16, virtual_stages=2, group=group),
                cost,
                latency=0.5,
            )
        )
        for group in (4, 8, 16)
    ]
    assert took == sorted(took, reverse=True)
    assert took[1] < took[0]


def test_a_slow_stage_sets_the_pace():
    def slow(action: Action) -> float:
        return cost(action) * (3 if action.stage == 1 else 1)

    spans = simulate(programs("1f1b", 2, 50), slow)
    assert makespan(spans) == 1 + 50 * 9 + 2
    assert bubble(spans) == pytest.approx(1 - (50 * 3 + 50 * 9) / (2 * 453))


def test_ranks_that_wait_for_each_other():
    ranks = programs("gpipe", 2, 2)
    forward = ranks[0].index(Action(Kind.FORWARD, 0, 1))
    ranks[0].append(ranks[0].pop(forward))
    with pytest.raises(ValueError) as error:
        simulate(ranks, cost)
    assert str(error.value) == (
        "deadlock: rank 0 at backward of stage 0, micro-batch 0; "
        "rank 1 at forward of stage 1, micro-batch 1"
    )


def test_a_rank_alone_has_no_bubble():
    spans = simulate(programs("1f1b", 1, 3), cost)
    assert bubble(spans) == 0
    assert spans[0][-1] == Span(Action(Kind.BACKWARD, 0, 2), 7, 9)


def test_simulate_imports_the_standard_library_alone():
    module = "megallama.parallel.pipeline.simulate"
    code = (
        f"import {module}, sys; print(sorted({{'torch', 'numpy', 'pydantic'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
