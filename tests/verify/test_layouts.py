"""Every layout gives the numbers of one process, by the bars of `verify/compare.py`."""

from __future__ import annotations

from typing import Any

import pytest

from megallama.verify.run import verify

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2": {"layout": {"tensor": 2}},
    "TP4": {"layout": {"tensor": 4}},
    "PP2": {"layout": {"pipeline": 2}},
    "PP2 gpipe": {"layout": {"pipeline": 2, "schedule": "gpipe"}},
    "PP4": {"layout": {"pipeline": 4}},
    "FSDP2": {"layout": {"data_shard": 2}},
    "FSDP4": {"layout": {"data_shard": 4}},
    "HSDP 2x2": {"layout": {"data_shard": 2, "data_replicate": 2}},
    "replicas 2": {"layout": {"data_replicate": 2}},
    "TP2 PP2": {"layout": {"tensor": 2, "pipeline": 2}},
    "TP2 FSDP2": {"layout": {"tensor": 2, "data_shard": 2}},
    "TP2 replicas 2": {"layout": {"tensor": 2, "data_replicate": 2}},
    "PP2 FSDP2": {"layout": {"pipeline": 2, "data_shard": 2}},
    "PP2 FSDP2 resharding": {
        "layout": {"pipeline": 2, "data_shard": 2, "reshard_after_forward": True}
    },
    "PP2 replicas 2": {"layout": {"pipeline": 2, "data_replicate": 2}},
    "FSDP2 without resharding": {"layout": {"data_shard": 2, "reshard_after_forward": False}},
    "TP2 PP2 FSDP2": {"layout": {"tensor": 2, "pipeline": 2, "data_shard": 2}},
    "TP2 PP2 HSDP 2x2": {
        "layout": {"tensor": 2, "pipeline": 2, "data_shard": 2, "data_replicate": 2}
    },
    "kv_heads 2, TP4": {"layout": {"tensor": 4}, "model": {"kv_heads": 2}},
    "kv_heads 2, TP4 FSDP2": {
        "layout": {"tensor": 4, "data_shard": 2},
        "model": {"kv_heads": 2},
    },
    "uneven vocabulary, TP2": {"layout": {"tensor": 2}, "model": {"vocab": 500}},
    "uneven vocabulary, TP4 PP2": {
        "layout": {"tensor": 4, "pipeline": 2},
        "model": {"vocab": 500},
    },
    "tied, TP2 FSDP2": {
        "layout": {"tensor": 2, "data_shard": 2},
        "model": {"tie_embeddings": True},
    },
    "uneven layers, PP4": {"layout": {"pipeline": 4}, "model": {"layers": 5}},
    "uneven shards, FSDP3": {"layout": {"data_shard": 3}, "train": {"global_batch_tokens": 9216}},
    "RoPE scaling, TP2": {
        "layout": {"tensor": 2},
        "model": {"rope_scaling": {"factor": 8.0}},
    },
    "full recomputation, TP2 PP2 FSDP2": {
        "layout": {"tensor": 2, "pipeline": 2, "data_shard": 2},
        "train": {"activation_checkpointing": "full"},
    },
    "selective recomputation, TP2 PP2 FSDP2": {
        "layout": {"tensor": 2, "pipeline": 2, "data_shard": 2},
        "train": {"activation_checkpointing": "selective"},
    },
    "without document mask, TP2": {
        "layout": {"tensor": 2, "micro_batch": 2},
        "data": {"document_mask": False},
    },
    "without clipping, FSDP2": {"layout": {"data_shard": 2}, "train": {"grad_clip": 0.0}},
}
IN_EVERY_RUN = {"TP2 PP2", "HSDP 2x2", "kv_heads 2, TP4"}


def cases(in_every_run: set[str]) -> list[Any]:
    return [
        pytest.param(name, id=name, marks=() if name in in_every_run else (pytest.mark.slow,))
        for name in LAYOUTS
    ]


def assert_same_numbers(config: Any, dtype: str) -> None:
    report = verify(config, dtype=dtype, steps=20, max_processes=16)
    assert len(report.steps) == 20
    assert report.passed, [check for check in report.checks if not check.passed]


@pytest.mark.parametrize("name", cases(IN_EVERY_RUN))
def test_float64(name, config_for):
    assert_same_numbers(config_for(**LAYOUTS[name]), "float64")


@pytest.mark.parametrize("name", cases({"TP2 PP2"}))
def test_float32(name, config_for):
    assert_same_numbers(config_for(**LAYOUTS[name]), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "PP2", "FSDP2", "TP2 PP2 FSDP2", "HSDP 2x2"])
def test_bf16(name, config_for):
    assert_same_numbers(config_for(**LAYOUTS[name]), "bf16")
