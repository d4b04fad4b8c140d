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

    def scaled(trainer, *args):
        counted = step.sum_over
        size = trainer.groups.data.size
        step.sum_over = lambda x, group: x * size  # each data rank divides by its own count
        try:
            return run(trainer, *args)
        finally:
            step.sum_over = counted

    step._run = scaled


def mean_of_micro_batch_means() -> None:
    from megallama.parallel.pipeline import runtime

    forward = runtime._forward

    def per_micro_batch(state, action, received):
        valid = (state.micro_batches[action.micro_batch].labels >= 0).sum().clamp(min=1)
        whole = state.loss_scale
        state.loss_scale = 1 / (valid * len(state.micro_batches)).to(whole.dtype)
        forward(state, action, received)
        state.loss_scale = whole

    runtime._COMPUTE[runtime.Kind.FORWARD] = per_micro_batch


def gradient_scaled_by_data_parallel_size() -> None:
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.set_gradient_divide_factor = lambda self, factor: None
    FSDPModule.set_force_sum_reduction_for_comms = lambda self, enable: None


def stage_skips_a_layer() -> None:
    from megallama.train import session

    build = session.build_stages

    def shortened(config, groups, device):
        stages = build(config, groups, device)
        if groups.pipeline.rank == 1:
            last = list(stages.module.layers)[-1]
            skipped = stages.module.layers[last]
            skipped.wrapped = lambda x, plan: x + 0 * skipped.compute(x, plan)
        return stages

    session.build_stages = shortened


def step_before_the_last_micro_batch() -> None:
    """The loss is right; the last micro-batch's gradient comes too late to count."""
    from megallama.parallel.pipeline import runtime

    backward = runtime._backward

    def without_the_last(state, action, received):
        key = (action.stage, action.micro_batch)
        if action.micro_batch == len(state.micro_batches) - 1:
            state.outputs[key] = state.outputs[key] * 0
        backward(state, action, received)

    runtime._COMPUTE[runtime.Kind.BACKWARD] = without_the_last


def replicated_kv_heads_not_summed() -> None:
    from megallama.parallel import tensor

    tensor.kv_head_of = lambda axis, placed: 0


def norm_counted_on_every_tensor_rank() -> None:
    from megallama.train import optimizer

    share = optimizer.squared_norm_share

    def every_rank(gradients, groups, kv_heads, squared_norm):
        return share(gradients, groups, kv_heads, squared_norm) + sum(
            g.square().sum()
            for name, g in gradients.items()
            if "norm" in name and groups.tensor.rank > 0
        )

    from megallama.train import step

    step.squared_norm_share = every_rank


def labels_of_padding_counted() -> None:
    from megallama.parallel import tensor

    find = tensor.loss_and_gradients
    tensor.loss_and_gradients = lambda *args, vocab, **named: find(*args, vocab=10**9, **named)


def context_gradients_not_summed() -> None:
    from dataclasses import replace

    from megallama.train import session

    build = session.build_process_groups

    def without_context(*args, **kwargs):
        groups = build(*args, **kwargs)
        return replace(groups, fsdp_mesh=groups.mesh["data_shard"])

    session.build_process_groups = without_context


def chunks_in_the_wrong_order() -> None:
    from megallama.parallel.context import compose

    compose.stream_order = lambda spans: list(range(sum(len(r) for s in spans for r in s)))


def positions_restart_in_each_chunk() -> None:
    from dataclasses import replace

    from megallama.parallel.context import compose

    plan = compose._PLANS["all_gather"]

    def restarted(stream, spans, rank):
        places = torch.cat([torch.arange(len(r)) for r in spans[rank]])
        held = plan(stream, spans, rank)
        return replace(held, positions=places.int().clamp(max=len(held.cos) - 1))

    compose._PLANS["all_gather"] = restarted


def document_leaks_over_a_border() -> None:
    """Only where a document began in another rank's chunk."""
    from megallama.model import attention

    segments = attention._segments

    def leaking(cu_seqlens, queries):
        for segment in segments(cu_seqlens, queries):
            start, stop = segment.keys
            whole = stop - start == segment.queries[1] - segment.queries[0]
            yield segment if whole else segment._replace(keys=(max(0, start - 1), stop))

    attention._segments = leaking


def ring_block_attributed_to_the_wrong_rank() -> None:
    from megallama.parallel.context import compose

    see = compose.visible
    compose.visible = lambda cu, mine, block, device: see(cu, mine, mine, device)


def head_copies_in_another_order() -> None:
    repeat = torch.Tensor.repeat_interleave

    def tiled(x, repeats, dim=None):
        return x.repeat(1, repeats, 1) if dim == 1 else repeat(x, repeats, dim)

    torch.Tensor.repeat_interleave = tiled


def swapped_messages() -> None:
    from megallama.parallel.pipeline import runtime

    receive = runtime._received

    def swapped(state, action):
        first = action.micro_batch < 2
        return receive(
            state, action._replace(micro_batch=1 - action.micro_batch) if first else action
        )

    runtime._received = swapped


def tied_copies_not_summed() -> None:
    from megallama.train import step

    step.sum_tied_gradient = lambda gradients, groups: None


def kernel_is_not_launched() -> None:
    from importlib import import_module

    name, kernel = os.environ["SILENT_KERNEL"].split(".")
    module = import_module(f"megallama_kernels.{name}")

    real = getattr(module, kernel)

    class StandIn:
        def __getitem__(self, grid):
            launch = real[grid]
            return launch if "LAUNCHED_AFTER_ALL" in os.environ else lambda *args, **options: None

    setattr(module, kernel, StandIn())


def run(fault: str, plain_config: dict[str, Any], folder: str) -> int:
    globals()[fault]()
    return layout.run(plain_config, folder)


def run_from_environment(plain_config: dict[str, Any], folder: str) -> int:
    return run(os.environ["PLANTED_FAULT"], plain_config, folder)
