"""A run goes on in another layout: the same tokens in the same order, the same losses."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.cli import train_rank
from megallama.train import loop, step
from tests.train.runs import FOUR, apart, curve, rewind, train_through

STEPS = 6
RUN = ("model.layers=4", f"train.steps={STEPS}", "checkpoint.every=1", f"checkpoint.keep={STEPS}")

ONE: tuple[str, ...] = ()
SHARDED, PIPELINE, CONTEXT = ("layout.data_shard=2",), ("layout.pipeline=2",), ("layout.context=2",)
INTERLEAVED = (*PIPELINE, "layout.schedule=interleaved_1f1b", "layout.virtual_stages=2")
RING = (*CONTEXT, "layout.context_method=ring")
ULYSSES = (*CONTEXT, "layout.context_method=ulysses")
PER_DOCUMENT = (*CONTEXT, "layout.context_balance=per_document")


def size(rows: int) -> tuple[str, ...]:
    return (f"layout.micro_batch={rows}",)


@dataclass(frozen=True)
class Computed:
    """Tokens of one micro-batch on one rank."""

    data: tuple[int, int]
    """Rank and size."""
    micro_batch: int
    held: list[int] | None
    """Where they are in the stream; None: all of it, in order."""
    tokens: list[int]


def train_and_note(plain: dict[str, Any]) -> int:
    """As a rank: what `megallama.cli:train_rank` does; and tokens are noted before they compute."""
    noted = noted_in(Path(plain["run"]))
    read_step, plan_for_rank, execute = loop.read_step, step.plan_for_rank, step.execute
    current: int | None = None
    held: list[list[int] | None] = []

    def read_and_note_step(trainer: Any, samples: Any, number: int) -> Any:
        nonlocal current
        current = number + 1
        return read_step(trainer, samples, number)

    def plan_and_note(*args: Any) -> Any:
        at, plan = plan_for_rank(*args)
        held.append(None if at is None else at.tolist())
        return at, plan

    def execute_and_note(
        todo: Any, stages: Any, micro_batches: Any, groups: Any, *rest: Any
    ) -> Any:
        data = groups.data.rank, groups.data.size
        computed = [
            Computed(data, number, at, micro_batch.tokens.tolist())
            for number, (at, micro_batch) in enumerate(zip(held, micro_batches, strict=True))
        ]
        held.clear()
        torch.save(computed, noted / f"step-{current}-rank-{os.environ['RANK']}.pt")
        return execute(todo, stages, micro_batches, groups, *rest)

    loop.read_step, step.plan_for_rank = read_and_note_step, plan_and_note
    step.execute = execute_and_note
    return train_rank(plain)


def noted_in(run: Path) -> Path:
    return run.parent / "noted"


def train(run: Path, *overrides: str) -> dict[int, list[int]]:
    """Start or resume the run; the tokens of each step it computed, in the order of the batch."""
    noted = noted_in(run)
    noted.mkdir(parents=True)
    assert train_through("tests.train.test_elastic:train_and_note", run, *RUN, *overrides) == 0
    steps: dict[int, list[Computed]] = {}
    for file in noted.iterdir():
        number = int(file.name.split("-")[1])
        steps.setdefault(number, []).extend(torch.load(file, weights_only=False))
    shutil.rmtree(noted)
    return {number: stream_of(computed) for number, computed in steps.items()}


def stream_of(computed: list[Computed]) -> list[int]:
    """The global batch: micro-batch by micro-batch, in each the data ranks in turn."""
    streams: dict[tuple[int, int], dict[int, int]] = {}
    for piece in computed:
        stream = streams.setdefault((piece.micro_batch, piece.data[0]), {})
        places = range(len(piece.tokens)) if piece.held is None else piece.held
        for place, token in zip(places, piece.tokens, strict=True):
            assert stream.setdefault(place, token) == token, "ranks disagree"
    assert all(sorted(stream) == list(range(len(stream))) for stream in streams.values())
    assert {place for _, place in streams} == set(range(computed[0].data[1]))
    return [streams[key][place] for key in sorted(streams) for place in sorted(streams[key])]


def assert_same(
    found: list[tuple[int, float, float]], wanted: list[tuple[int, float, float]]
) -> None:
    """Steps, losses and grad norms."""
    steps, losses, norms = zip(*found, strict=True)
    wanted_steps, wanted_losses, wanted_norms = zip(*wanted, strict=True)
    assert steps == wanted_steps
    assert apart(losses, wanted_losses) < 1e-9
    assert apart(norms, wanted_norms) < 1e-9


slow = pytest.mark.slow

CHANGES = {
    "micro-batches of 1 to 4": (size(1), size(4)),
    "data to context": (SHARDED, CONTEXT),
    "Ulysses to one rank": (ULYSSES, ONE),
    "1F1B to interleaved": (PIPELINE, INTERLEAVED),
    "context to pipeline, larger micro-batches": (PER_DOCUMENT, (*PIPELINE, *size(4))),
}
SLOW_CHANGES = {
    "micro-batches of 4 to 2": (size(4), size(2)),
    "context to data": (CONTEXT, SHARDED),
    "ring to Ulysses": (RING, ULYSSES),
    "interleaved to 1F1B": (INTERLEAVED, PIPELINE),
    "gathered to ring": (CONTEXT, RING),
    "Ulysses to per document": (ULYSSES, PER_DOCUMENT),
    "TP2 PP2 to CP2 FSDP2": (FOUR, (*RING, *SHARDED)),
    "CP4 to TP2 CP2": (("layout.context=4",), ("layout.tensor=2", *CONTEXT)),
    "FSDP4 to CP2 PP2 interleaved": (("layout.data_shard=4",), (*CONTEXT, *INTERLEAVED)),
    "HSDP 2x2 to TP4": (
        ("layout.data_replicate=2", *SHARDED, *size(2)),
        ("layout.tensor=4", *size(1)),
    ),
}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(pytest.param(*change, id=name) for name, change in CHANGES.items()),
        *(pytest.param(*change, id=name, marks=slow) for name, change in SLOW_CHANGES.items()),
    ],
)
def test_resumed_in_another_layout(tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]):
    run = tmp_path / "run"
    tokens = train(run, *before)
    whole = curve(run)
    assert sorted(tokens) == list(range(1, STEPS + 1))
    assert len({tuple(batch) for batch in tokens.values()}) == STEPS, "a batch was read twice"
    rewind(run, 3)
    assert train(run, *after) == {number: tokens[number] for number in (4, 5, 6)}
    assert_same(curve(run), whole)


@pytest.mark.slow
def test_resumed_in_a_new_layout_again_and_again(tmp_path: Path):
    run = tmp_path / "run"
    tokens = train(run, *ONE, *size(2))
    whole = curve(run)
    layouts = [SHARDED, INTERLEAVED, RING, ("layout.tensor=2", *size(4)), (*CONTEXT, *SHARDED)]
    for done, layout in enumerate(layouts, start=1):
        rewind(run, done)
        left = range(done + 1, STEPS + 1)
        assert train(run, *layout) == {number: tokens[number] for number in left}
        assert_same(curve(run), whole)
