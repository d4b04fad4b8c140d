"""Rotary position embedding (Su et al. 2021) of heads that may lie in a packed projection.

Features are paired as Hugging Face does: feature i with feature i + head_dim/2. Angles come from a
table by position, so that packed documents and slices of a sequence need no copies. Forward and
backward, which turns the other way, read and write each element once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megallama_kernels.language import (
    OPTIONS,
    at_least_float32,
    jit,
    launches,
    next_power_of_2,
    tl,
    triton,
)

TILE = 2048
"""Feature pairs that a program turns."""
WARPS = 4


@jit
def _turn(
    x_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    y_ptr,
    heads_in_all,
    heads,
    x_token,
    x_head,
    x_feature,
    sign,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    feature = tl.arange(0, BLOCK)[None, :]
    exists = row < heads_in_all
    real = exists[:, None] & ((feature < HALF) | (HALF == BLOCK))
    position = tl.load(position_ptr + token, mask=exists, other=0).to(tl.int64)
    angle = position[:, None] * HALF + feature
    cos = tl.load(cos_ptr + angle, mask=real, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=real, other=0.0) * sign
    at = x_ptr + (token * x_token + head * x_head)[:, None] + feature * x_feature
    first = tl.load(at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(at + HALF * x_feature, mask=real, other=0.0).to(tl.float32)
    to = y_ptr + row[:, None] * (2 * HALF) + feature
    tl.store(to, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=real)
    tl.store(to + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=real)


def reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate heads by the angles of their tokens' positions.

    Args:
        x: `[T, H, head_dim]`.
        cos: `[S, head_dim/2]`, float32 or float64: what is computed in.
        sin: the same.
        positions: `[T]` int32, below S.

    """
    return _Turn.apply(x, cos, sin, positions)


class _Turn(torch.autograd.Function):
    """Backward turns the other way; nothing but the tables is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        return _turned(x, cos, sin, positions, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        return _turned(grads[0], cos, sin, positions, -1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: int) -> Tensor:
    cos, sin = cos[positions][:, None], sign * sin[positions][:, None]
    first, second = at_least_float32(x).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


@torch.library.custom_op("megallama::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: int) -> Tensor:
    if not launches(x):
        return _turned(x, cos, sin, positions, sign)
    tokens, heads, head_dim = x.shape
    y = _like(x)
    block = next_power_of_2(head_dim // 2)
    rows = max(1, TILE // block)
    if y.numel():
        _turn[(triton.cdiv(tokens * heads, rows),)](
            x,
            cos,
            sin,
            positions,
            y,
            tokens * heads,
            heads,
            *x.stride(),
            sign,
            HALF=head_dim // 2,
            ROWS=rows,
            BLOCK=block,
            num_warps=WARPS,
            **OPTIONS,
        )
    return y


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_rotate.register_fake(lambda x, cos, sin, positions, sign: _like(x))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tables, ctx.sign = inputs
    ctx.save_for_backward(*tables)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _rotate(dy, *ctx.saved_tensors, -ctx.sign), None, None, None, None


_rotate.register_autograd(_backward, setup_context=_keep)


def _no_model_flops(*_args: Any, **_kwargs: Any) -> int:
    return 0


register_flop_formula(torch.ops.megallama.rotate)(_no_model_flops)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """The fused op of `reference`; `x` may have any strides."""
    return _rotate(x, cos, sin, positions, 1)
