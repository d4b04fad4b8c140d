"""Activation checkpointing and torch.compile, block by block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megallama.model.attention import AttentionPlan
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
    }
)
"""Operations whose results selective checkpointing keeps: matrix products and attention.
Collectives are recomputed, and must be functional ones: keeping the result of an in-place one is
wrong in silence."""


def wrap_block(block: Block, *, activation_checkpointing: str, compile_block: bool) -> None:
    """Make a block recompute in backward, run compiled, or both; the arithmetic stays `compute`."""
    run: Callable[[Tensor, AttentionPlan], Tensor] = block.compute
    if activation_checkpointing == "full":
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    elif activation_checkpointing == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _keep_expensive)
        run = partial(
            checkpoint, run, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    if compile_block:
        run = torch.compile(run)
    block.wrapped = None if run == block.compute else run


def _keep_expensive(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operation in EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
