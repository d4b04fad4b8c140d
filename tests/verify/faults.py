"""Planted faults: each patches one production line in every rank, then runs the layout as usual."""

from __future__ import annotations

import os
from typing import Any

import torch

from megallama.verify import layout


def clones_across_tensor_ranks() -> None:
    from megallama.parallel import materialize

    held = materialize.held_region

    def of_first_rank(name, shape, config, tensor, sharding):
        first = type(tensor)(tensor.size, 0, tensor.group)
        return held(name, shape, config, first, sharding)

    materialize.held_region = of_first_rank


def norm_weights_not_reduced() -> None:
    from torch.distributed.tensor import Replicate

    from megallama.parallel import tensor

    tensor.Partial = Replicate


def mean_of_means() -> None:
    from megallama.train import step

    run = step._run

    def scaled(trainer, batches, schedule):
        counted = step.sum_over
        size = trainer.groups.data.size
        step.sum_over = lambda x, group: x * size  # each data rank divides by its own count
        try:
            return run(trainer, batches, schedule)
        finally:
            step.sum_over = counted

    step._run = scaled


def mean_of_micro_batch_means() -> None:
    from megallama.parallel.pipeline import runtime

    forward = runtime._forward

    def per_micro_batch(state, stage, m, micro_batches, loss_scale):
        valid = (micro_batches[m].labels >= 0).sum().clamp(min=1)
        forward(
            state, stage, m, micro_batches, 1 / (valid * len(micro_batches)).to(loss_scale.dtype)
        )

    runtime._forward = per_micro_batch


def gradient_scaled_by_data_parallel_size() -> None:
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.set_gradient_divide_factor = lambda self, factor: None
    FSDPModule.set_force_sum_reduction_for_comms = lambda self, enable: None


def stage_skips_a_layer() -> None:
    from megallama.parallel import compose

    build = compose.build_stage

    def shortened(config, groups, device):
        stage = build(config, groups, device)
        if stage.index == 1:
            last = list(stage.module.layers)[-1]
            skipped = stage.module.layers[last]
            skipped.wrapped = lambda x, plan: x + 0 * skipped.compute(x, plan)
        return stage

    from megallama.train import session

    session.build_stage = shortened


def step_before_the_last_micro_batch() -> None:
    """The loss is right; the last micro-batch's gradient comes too late to count."""
    from megallama.parallel.pipeline import runtime

    backward = runtime._backward

    def without_the_last(state, stage, m, *, last):
        if last:
            state.outputs[m] = state.outputs[m] * 0
        backward(state, stage, m, last=last)

    runtime._backward = without_the_last


def replicated_kv_heads_not_summed() -> None:
    from megallama.parallel import tensor

    tensor.kv_head_of = lambda axis, placed: 0


def norm_counted_on_every_tensor_rank() -> None:
    from megallama.train import optimizer

    share = optimizer.squared_norm_share

    def every_rank(gradients, groups, kv_heads):
        return share(gradients, groups, kv_heads) + sum(
            g.square().sum()
            for name, g in gradients.items()
            if "norm" in name and groups.tensor.rank > 0
        )

    from megallama.train import step

    step.squared_norm_share = every_rank


def labels_of_padding_counted() -> None:
    from megallama.parallel import tensor

    tensor._without_padding = lambda logits, columns, vocab: logits.to(torch.float64)


def run(fault: str, plain_config: dict[str, Any], folder: str) -> int:
    globals()[fault]()
    return layout.run(plain_config, folder)


def run_from_environment(plain_config: dict[str, Any], folder: str) -> int:
    return run(os.environ["PLANTED_FAULT"], plain_config, folder)
