"""What may be changed about a run without a change to its numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megallama.train.session import set_determinism
from tests.ranks import ranks
from tests.train.runs import (
    FOUR,
    apart,
    curve,
    evaluations,
    losses,
    rewind,
    saved_steps,
    train,
)
from tests.verify.layouts import make_config

SHARDED, PIPELINE = ("layout.data_shard=2",), ("layout.pipeline=2",)

Finished = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The folder of a finished run, trained once a module; to read, not to change."""
    known: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in known:
            known[overrides] = tmp_path_factory.mktemp("runs") / "run"
            assert train(known[overrides], *overrides) == 0
        return known[overrides]

    return run


@pytest.mark.parametrize("layout", [SHARDED, PIPELINE], ids=" ".join)
def test_evaluation_only_watches(finished: Finished, layout: tuple[str, ...]):
    watched = finished(*layout, "evaluation.every=2", "evaluation.batches=2")
    assert [step for step, _ in evaluations(watched)] == [2, 4, 6]
    assert curve(watched) == curve(finished(*layout))


@pytest.mark.parametrize(
    "layout",
    [
        PIPELINE,
        ("layout.context=2",),
        (*PIPELINE, "layout.schedule=interleaved_1f1b", "layout.virtual_stages=2"),
        pytest.param((*FOUR, "layout.context=2"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_held_out_loss_is_the_same_in_any_layout(finished: Finished, layout: tuple[str, ...]):
    model = ("model.layers=4", "model.tie_embeddings=true")
    evaluating = (*model, "evaluation.every=3", "evaluation.batches=2")
    (_, first), (_, last) = evaluations(finished(*layout, *evaluating))
    (_, first_alone), (_, last_alone) = evaluations(finished(*evaluating))
    assert abs(first / first_alone - 1) < 1e-12
    assert abs(last / last_alone - 1) < 1e-9


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PIPELINE, SHARDED),
        (SHARDED, (*PIPELINE, "layout.schedule=interleaved_1f1b", "layout.virtual_stages=2")),
    ],
)
def test_a_tied_weight_on_two_ranks_resumes_anywhere(
    tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]
):
    model = ("model.layers=4", "model.tie_embeddings=true")
    run = tmp_path / "run"
    assert train(run, *model, *before, "checkpoint.every=3") == 0
    whole = losses(run)
    rewind(run, 3)
    assert train(run, *model, *after) == 0
    assert apart(losses(run), whole) < 1e-9


@pytest.mark.parametrize("layout", [SHARDED, PIPELINE], ids=" ".join)
def test_checkpoints_only_watch(finished: Finished, layout: tuple[str, ...]):
    saving = finished(*layout, "checkpoint.every=1", "checkpoint.keep=2")
    assert saved_steps(saving) == [5, 6]
    assert curve(saving) == curve(finished(*layout))


def test_every_step_has_one_line(finished: Finished):
    assert [step for step, _, _ in curve(finished(*SHARDED))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("layout", [SHARDED, PIPELINE], ids=" ".join)
def test_resumed_in_the_same_layout_is_bitwise_the_same(tmp_path: Path, layout: tuple[str, ...]):
    assert train(tmp_path / "run", *layout, "checkpoint.every=3") == 0
    whole = curve(tmp_path / "run")
    rewind(tmp_path / "run", 3)
    assert train(tmp_path / "run", *layout, "checkpoint.every=3") == 0
    assert curve(tmp_path / "run") == whole


LAYOUTS = [
    ((), SHARDED),
    (SHARDED, PIPELINE),
    (PIPELINE, ("layout.micro_batch=4",)),
    pytest.param(FOUR, ("layout.data_shard=4",), marks=pytest.mark.slow),
    pytest.param(("layout.tensor=4",), ("layout.data_replicate=2",), marks=pytest.mark.slow),
    pytest.param(
        ("layout.data_replicate=2", "layout.data_shard=2"),
        ("layout.tensor=2", "layout.data_shard=2", "layout.micro_batch=2"),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("before", "after"), LAYOUTS)
def test_resumed_in_another_layout_goes_on(
    tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]
):
    run = tmp_path / "run"
    assert train(run, *before, "checkpoint.every=3") == 0
    whole = losses(run)
    rewind(run, 3)
    assert train(run, *after) == 0
    assert [step for step, _, _ in curve(run)] == [1, 2, 3, 4, 5, 6]
    assert losses(run)[:3] == whole[:3]
    assert apart(losses(run), whole) < 1e-9


def test_a_finished_run_is_left_as_it_is(tmp_path: Path):
    assert train(tmp_path / "run") == 0
    before = curve(tmp_path / "run")
    assert train(tmp_path / "run") == 0
    assert curve(tmp_path / "run") == before


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert train(run, *PIPELINE, "checkpoint.every=3") == 0
    whole = curve(run)
    shards = (run / "checkpoints" / "step-00000006").glob("*.distcp")
    victim = sorted(shards)[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    capfd.readouterr()
    assert train(run, *PIPELINE, "checkpoint.every=3") == 0
    said = f"passed over a checkpoint: step-00000006: the content of {victim.name} has changed"
    assert capfd.readouterr().err.count(said) == 1
    assert curve(run) == [*whole, *whole[3:]]
    assert saved_steps(run) == [3, 6]


@pytest.mark.parametrize("size", [2, 4])
def test_accumulation_does_not_change_the_loss(finished: Finished, size: int):
    one = losses(finished("layout.micro_batch=1"))
    assert apart(losses(finished(f"layout.micro_batch={size}")), one) < 1e-12


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("layout", [(), PIPELINE], ids=" ".join)
def test_recomputing_activations_does_not_change_the_loss(
    finished: Finished, mode: str, layout: tuple[str, ...]
):
    recomputed = finished(*layout, f"train.activation_checkpointing={mode}")
    assert apart(losses(recomputed), losses(finished(*layout))) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputing_activations_on_every_axis(finished: Finished, mode: str):
    recomputed = finished(*FOUR, f"train.activation_checkpointing={mode}")
    assert apart(losses(recomputed), losses(finished(*FOUR))) < 1e-12


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(finished: Finished):
    compiled = finished("train.compile=true", "train.precision=fp32", "train.steps=3")
    eager = finished("train.precision=fp32", "train.steps=3")
    assert apart(losses(compiled), losses(eager)) < 1e-5


def test_deterministic_mode_changes_nothing_here(finished: Finished):
    assert curve(finished("train.deterministic=true")) == curve(finished())


@ranks(1)
def test_deterministic_mode_is_torchs():
    for asked in (False, True):
        set_determinism(make_config(train={"deterministic": asked}))
        assert torch.are_deterministic_algorithms_enabled() is asked


def test_the_seed_decides(finished: Finished, tmp_path: Path):
    assert losses(finished("train.seed=7")) != losses(finished())
    assert train(tmp_path / "run", "train.seed=7") == 0
    assert curve(tmp_path / "run") == curve(finished("train.seed=7"))


def test_the_loss_falls(finished: Finished):
    run = losses(finished("train.steps=20", "layout.micro_batch=8"))
    assert sum(run[-5:]) / 5 < sum(run[:5]) / 5 - 0.1
