"""A state saved in one layout and loaded in another: every tensor of it, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megallama.checkpoint.sharded import find_newest
from megallama.config.schema import Config
from megallama.data.batch import Batch
from megallama.train.session import build_trainer, resume, save_checkpoint
from megallama.train.step import Trainer, train_step
from tests.ranks import ranks

SEQ_LEN, SAMPLES = 32, 12
STEP = 2
IDENTITY = "of random tokens"


class Random:
    """Stands for a dataset: its fingerprint is all that a checkpoint asks for."""

    fingerprint = IDENTITY


def config_of(run: Path, layout: dict[str, int]) -> Config:
    return Config.model_validate(
        {
            "run": str(run),
            "model": {
                "hidden": 32,
                "layers": 2,
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 8,
                "ffn": 64,
                "vocab": 512,
            },
            "layout": {"data_shard": 1} | layout,
            "data": {"seq_len": SEQ_LEN},
            "train": {
                "global_batch_tokens": SEQ_LEN * SAMPLES,
                "steps": 10,
                "precision": "fp64",
            },
            "optimizer": {"lr": 1e-2},
        }
    )


def step(trainer: Trainer, number: int) -> float:
    """Train on random tokens, the same in every layout."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(512, (SAMPLES, SEQ_LEN + 1), generator=generator)
    data = trainer.groups.data
    batches = [
        Batch(row[:-1], row[1:], torch.arange(SEQ_LEN), (0, SEQ_LEN))
        for row in tokens[data.rank :: data.size]
    ]
    return train_step(trainer, batches, 1e-2).loss


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint holds and this rank has a part of, put together."""
    state = trainer.optimizer.canonical_state()
    return {name: tensor.full_tensor().clone() for name, tensor in state.items()}  # type: ignore[attr-defined]


@ranks(1)
def saving(run: Path, layout: dict[str, int]) -> None:
    trainer = build_trainer(config_of(run, layout), torch.device("cpu"))
    for number in range(STEP):
        step(trainer, number)
    save_checkpoint(trainer, Random(), STEP)  # type: ignore[arg-type]
    state = whole_state(trainer)
    loss = step(trainer, STEP)
    torch.save((state, loss), run / f"expected-{dist.get_rank()}.pt")


@ranks(1)
def loading(run: Path, layout: dict[str, int]) -> None:
    expected: dict[str, torch.Tensor] = {}
    for file in run.glob("expected-*.pt"):
        state, loss = torch.load(file)
        expected |= state
    trainer = build_trainer(config_of(run, layout), torch.device("cpu"))
    assert resume(trainer) == (STEP, [])
    seen = whole_state(trainer)
    assert len(seen) >= 3 * 6
    for name, tensor in seen.items():
        assert torch.equal(tensor, expected[name]), name
    assert any("exp_avg_sq" in name and tensor.abs().max() > 0 for name, tensor in seen.items())
    assert trainer.optimizer.completed == STEP
    count: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(count, sorted(seen))
    assert {name for names in count for name in names} == set(expected)
    assert abs(step(trainer, STEP) - loss) < 1e-12 * abs(loss)


def in_ranks(body: Any, world_size: int, **kwargs: Any) -> None:
    ranks(world_size)(body.__wrapped__)(**kwargs)


def size_of(layout: dict[str, int]) -> int:
    size = 1
    for ways in layout.values():
        size *= ways
    return size


ONE: dict[str, int] = {}
TP2_FSDP2, TP2_PP2 = {"tensor": 2, "data_shard": 2}, {"tensor": 2, "pipeline": 2}
QUICK = [
    (TP2_PP2, ONE),
    ({"data_shard": 3}, {"pipeline": 2}),  # 32 and 64 rows over 3 ranks: uneven shards
    ({"pipeline": 2}, {"data_shard": 3}),
]
SLOW = [
    (TP2_FSDP2, {"data_shard": 4}),
    (ONE, TP2_PP2),
    ({"tensor": 4}, {"data_replicate": 2, "data_shard": 2}),  # 2 kv heads: wkv is replicated
]


def named(layout: dict[str, int]) -> str:
    return " ".join(f"{axis} {ways}" for axis, ways in layout.items()) or "one process"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(pytest.param(*pair, id=" to ".join(map(named, pair))) for pair in QUICK),
        *(
            pytest.param(*pair, id=" to ".join(map(named, pair)), marks=pytest.mark.slow)
            for pair in SLOW
        ),
    ],
)
def test_any_layout_loads_what_any_other_saved(
    tmp_path: Path, before: dict[str, int], after: dict[str, int]
):
    in_ranks(saving, size_of(before), run=tmp_path, layout=before)
    in_ranks(loading, size_of(after), run=tmp_path, layout=after)


@ranks(2)
def test_every_rank_learns_of_the_same_checkpoint(tmp_path: Path):
    root = tmp_path / "checkpoints"
    assert find_newest(root) == (None, [])
    trainer = build_trainer(config_of(tmp_path, {"data_shard": 2}), torch.device("cpu"))
    assert resume(trainer) == (0, [])
    step(trainer, 0)
    for number in (1, 2):
        save_checkpoint(trainer, Random(), number)  # type: ignore[arg-type]
    if dist.get_rank() == 0:
        (root / "step-00000002" / ".metadata").unlink()
    dist.barrier()
    manifest, passed_over = find_newest(root)
    assert manifest is not None
    assert manifest.step == 1
    assert manifest.data_fingerprint == IDENTITY
    assert passed_over == ["step-00000002: .metadata is missing"]
    assert resume(trainer) == (1, passed_over)
    # saving the same step again replaces the damaged one
    save_checkpoint(trainer, Random(), 2)  # type: ignore[arg-type]
    assert resume(trainer) == (2, [])


@ranks(2)
def masters_there_and_back(run: Path) -> None:
    """Split masters saved and loaded whole, trained on, saved and loaded split again."""
    plain = config_of(run, {"data_shard": 2}).model_dump()
    plain["train"]["precision"] = "bf16"
    before: dict[str, torch.Tensor] | None = None
    for done, master in enumerate(("split", "fp32", "split")):
        plain["optimizer"]["master"] = master
        trainer = build_trainer(Config.model_validate(plain), torch.device("cpu"))
        assert resume(trainer) == (done, [])
        loaded = whole_state(trainer)
        if before is not None:
            assert before.keys() == loaded.keys()
            assert all(torch.equal(before[name], loaded[name]) for name in before)
        step(trainer, done)
        before = whole_state(trainer)
        assert not any(torch.equal(before[n], t) for n, t in loaded.items() if "wq" in n)
        save_checkpoint(trainer, Random(), done + 1)  # type: ignore[arg-type]


def test_masters_split_and_whole_load_each_other(tmp_path: Path) -> None:
    in_ranks(masters_there_and_back, 2, run=tmp_path)


@ranks(1)
def low_halves_are_held_once() -> None:
    plain = config_of(Path("unused"), {}).model_dump()
    plain["train"]["precision"], plain["optimizer"]["master"] = "bf16", "split"
    trainer = build_trainer(Config.model_validate(plain), torch.device("cpu"))
    assert trainer.stages.low is not None
    held = {t.data_ptr() for t in trainer.stages.low.values()}
    states = trainer.optimizer.state.values()
    assert {state["low"].to_local().data_ptr() for state in states} == held


def test_low_halves_are_held_once() -> None:
    in_ranks(low_halves_are_held_once, 1)
