"""A config's twin that runs in seconds on CPU: the same features, few ranks, few numbers."""

import math
from typing import Any

from megallama.config.rules import resolve_world
from megallama.config.schema import (
    Config,
    LayoutConfig,
    ModelConfig,
    SourceConfig,
    frees_weights,
)
from megallama.mesh import AXES

PRECISION = {"float64": "fp64", "float32": "fp32", "bf16": "bf16"}

LEARNING_RATE = 1e-3
HEAD_DIM = 16
FFN = 96
SAMPLES = 8
"""Sequences in one step, at least: enough ways to cut a batch to judge rounding by."""


def shrink(config: Config, *, dtype: str, steps: int, max_processes: int) -> Config:
    """The config to verify.

    Kept: the axes that are used and how, schedule, virtual stages, fewer micro-batches than ranks,
    tying, freeing of gathered weights, grouped-query ratio up to 2 and kv_heads below tensor, RoPE
    scaling, uneven vocabulary and layers, document mask, clipping, activation checkpointing,
    compile. Axes are halved, the largest first, until they fit. Not kept: overlap through symmetric
    memory, which needs GPUs.

    Args:
        config: to be shrunk; a `data_shard` of -1 becomes 2, so that sharding is exercised.
        dtype: `float64`, `float32` or `bf16`.
        steps: optimizer steps.
        max_processes: of the layout.

    Raises:
        UserError: the twin breaks a rule that the config itself does not.

    """
    layout = _shrink_layout(config.layout, max_processes)
    model = _shrink_model(config.model, layout)
    # The twin is small, and would keep its weights where the config frees them.
    freed = frees_weights(config.model_copy(update={"layout": layout}))
    data_ranks = layout.data_shard * layout.data_replicate
    few = _micro_batches(config)
    if few < layout.pipeline:
        micro_batches, micro_batch = few, -(-SAMPLES // (data_ranks * few))
    else:
        micro_batch = min(2, layout.micro_batch)
        micro_batches = max(2 * layout.pipeline, SAMPLES // (data_ranks * micro_batch))
        micro_batches += few % 2  # an odd number stays odd: groups of them are uneven
    seq_len = (
        2 * layout.context * layout.tensor * max(1, 32 // (2 * layout.context * layout.tensor))
    )
    changes: dict[str, Any] = {
        "model": model,
        "layout": layout.model_copy(
            update={"micro_batch": micro_batch, "reshard_after_forward": freed}
        ),
        "data": config.data.model_copy(
            update={"sources": [SourceConfig(path="random tokens")], "seq_len": seq_len}
        ),
        "train": config.train.model_copy(
            update={
                "global_batch_tokens": seq_len * micro_batch * data_ranks * micro_batches,
                "steps": steps,
                "precision": PRECISION[dtype],
            }
        ),
        "optimizer": config.optimizer.model_copy(
            update={
                "lr": LEARNING_RATE,
                "master": config.optimizer.master if dtype == "bf16" else "fp32",
            }
        ),
        "lr_schedule": config.lr_schedule.model_copy(
            update={"warmup_steps": min(2, steps), "decay_steps": None, "min_lr": 0.0}
        ),
    }
    return resolve_world(config.model_copy(update=changes), world_size(layout))


def world_size(layout: LayoutConfig) -> int:
    """Processes of a layout whose `data_shard` is resolved."""
    return math.prod(getattr(layout, axis) for axis in AXES)


def _micro_batches(config: Config) -> int:
    """Of a step on one data rank; a world that is not known yet counts as one data rank."""
    layout = config.layout
    ranks = max(1, layout.data_shard) * layout.data_replicate
    return config.train.global_batch_tokens // (config.data.seq_len * layout.micro_batch * ranks)


def _shrink_layout(layout: LayoutConfig, max_processes: int) -> LayoutConfig:
    sizes = {axis: getattr(layout, axis) for axis in AXES}
    if sizes["data_shard"] == -1:
        sizes["data_shard"] = 2
    while math.prod(sizes.values()) > max_processes:
        largest = max(sizes, key=lambda axis: sizes[axis])
        sizes[largest] = max(1, sizes[largest] // 2)
    given = layout.stage_layers if sizes["pipeline"] == layout.pipeline else None
    if given is not None:
        given = [layers and 1 + (layers == max(given)) for layers in given]
    changes: dict[str, Any] = {"stage_layers": given, "tensor_overlap": False}
    if sizes["pipeline"] == 1 and layout.virtual_stages > 1:
        changes |= {"schedule": "1f1b", "virtual_stages": 1}
    return layout.model_copy(update=sizes | changes)


def _shrink_model(model: ModelConfig, layout: LayoutConfig) -> ModelConfig:
    stages = layout.pipeline * layout.virtual_stages
    layers = 2 * stages - (model.layers % stages > 0)
    kv_heads = math.gcd(model.kv_heads, 8)
    heads = kv_heads * min(2, model.heads // model.kv_heads)
    exchanged = layout.context if layout.context_method == "ulysses" else 1
    while heads % (layout.tensor * exchanged):
        heads *= 2
    return model.model_copy(
        update={
            "hidden": heads * HEAD_DIM,
            "layers": sum(layout.stage_layers) if layout.stage_layers else layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": HEAD_DIM,
            "ffn": FFN * layout.tensor // math.gcd(FFN, layout.tensor),
            "vocab": 256 if model.vocab % 128 == 0 else 244,
        }
    )
