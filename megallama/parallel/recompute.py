"""Activation checkpointing and torch.compile, block by block."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megallama.model.attention import AttentionPlan
from megallama.model.kernels import Enter, Kernels
from megallama.model.llama import Block

_aten = torch.ops.aten
EXPENSIVE = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
        torch.ops.higher_order.flex_attention,
        torch.ops.torch_attn._varlen_attn.default,
    }
)
"""Operations whose results selective checkpointing keeps: matrix products and attention.
Collectives are recomputed, and must be functional ones: keeping the result of an in-place one is
wrong in silence."""


Run = Callable[[Tensor, AttentionPlan], Tensor]
Recipe = Callable[[], Tensor]
"""Computes a tensor once more."""


def wrap_block(block: Block, *, activation_checkpointing: str, compile_block: bool) -> None:
    """Make a block recompute in backward, run compiled, or both; the arithmetic stays `compute`."""
    run: Run = block.compute
    if activation_checkpointing == "full":
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    elif activation_checkpointing == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _keep_expensive)
        run = partial(
            checkpoint, run, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    elif activation_checkpointing == "elementwise":
        run = _forgetting_elementwise(block)
    if compile_block:
        run = torch.compile(run)
    block.wrapped = None if run == block.compute else run


def _forgetting_elementwise(block: Block) -> Run:
    """`compute` that keeps no norm's result and no SwiGLU activation for backward, but computes
    them again, from tensors that are kept anyway. Nothing else is, and no collective runs twice.
    """
    made: dict[int, tuple[weakref.ref[Tensor], Recipe]] = {}
    block.kernels = _with_recipes(block.kernels, made)
    compute = block.compute

    def pack(saved: Tensor) -> Tensor | Recipe:
        if saved.data_ptr() not in made:
            return saved
        result, recipe = made[saved.data_ptr()]
        alive = result()  # if not, its memory may have become another tensor's
        return recipe if alive is not None and _laid_out_alike(alive, saved) else saved

    def unpack(kept: Tensor | Recipe) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    def run(x: Tensor, plan: AttentionPlan) -> Tensor:
        try:
            with saved_tensors_hooks(pack, unpack):
                return compute(x, plan)
        finally:
            made.clear()

    return run


def _laid_out_alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _with_recipes(kernels: Kernels, made: dict[int, tuple[weakref.ref[Tensor], Recipe]]) -> Kernels:
    """The same kernels, whose results' recipes are noted by address for as long as they live."""

    def note(result: Tensor, recipe: Recipe) -> Tensor:
        made[result.data_ptr()] = weakref.ref(result), recipe
        return result

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        again = partial(kernels.rms_norm, x.detach(), weight.detach(), eps)
        return note(kernels.rms_norm(x, weight, eps), again)

    def add_rms_norm(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, stream = kernels.add_rms_norm(x, residual, weight, eps)
        again = partial(kernels.rms_norm, stream.detach(), weight.detach(), eps)
        return note(normed, again), stream

    def swiglu(enter: Enter, x: Tensor, w13: Tensor) -> Tensor:
        kept: list[Tensor] = []
        weight = w13.detach()

        def enter_and_keep(*args: Tensor) -> tuple[Tensor, ...]:
            projected = enter(*args)
            kept.extend(p.detach() for p in projected)
            return projected

        def again() -> Tensor:  # without x, which is a norm's result
            return kernels.swiglu(lambda *_: tuple(kept), kept[0], weight)

        return note(kernels.swiglu(enter_and_keep, x, w13), again)

    return replace(kernels, rms_norm=rms_norm, add_rms_norm=add_rms_norm, swiglu=swiglu)


def _keep_expensive(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operation in EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
