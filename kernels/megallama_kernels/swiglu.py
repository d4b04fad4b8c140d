"""SwiGLU's activation (Shazeer 2020) on the packed projection `[T, F, 2]`: silu(gate) · up.

gate and up of a feature lie next to each other, so that any cut of the features keeps both. Forward
reads 2 elements and writes 1 per feature; backward reads 3 and writes 2, and computes the
activation's inner parts again: gate and up are all that is saved.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megallama_kernels.language import OPTIONS, at_least_float32, jit, launches, tl, triton

BLOCK = 1024
WARPS = 4


@jit
def _forward(
    packed_ptr,
    y_ptr,
    features,
    packed_row,
    packed_feature,
    packed_kind,
    SIDE_BY_SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, first = _place(features, BLOCK)
    feature = first + tl.arange(0, BLOCK)
    at = packed_ptr + row * packed_row
    gate, up = _gate_and_up(at, first, features, packed_feature, packed_kind, SIDE_BY_SIDE, BLOCK)
    y = gate / (1.0 + tl.exp(-gate)) * up
    at = y_ptr + row * features + feature
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=feature < features)


@jit
def _backward(
    dy_ptr,
    packed_ptr,
    dpacked_ptr,
    features,
    dy_row,
    dy_feature,
    packed_row,
    packed_feature,
    packed_kind,
    SIDE_BY_SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, first = _place(features, BLOCK)
    feature = first + tl.arange(0, BLOCK)
    at = packed_ptr + row * packed_row
    gate, up = _gate_and_up(at, first, features, packed_feature, packed_kind, SIDE_BY_SIDE, BLOCK)
    at = dy_ptr + row * dy_row + feature.to(tl.int64) * dy_feature
    dy = tl.load(at, mask=feature < features, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1.0 - sigmoid))
    both = tl.reshape(tl.join(dgate, dy * silu), (2 * BLOCK,))
    element = 2 * first + tl.arange(0, 2 * BLOCK)
    at = dpacked_ptr + row * 2 * features + element
    tl.store(at, both.to(dpacked_ptr.dtype.element_ty), mask=element < 2 * features)


@jit
def _place(features, BLOCK: tl.constexpr):
    """A program's row, and its first feature: in one dimension of the grid, which has no limit of
    65,535.
    """
    tiles = tl.cdiv(features, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK


@jit
def _gate_and_up(
    row_ptr, first, features, stride, kind, SIDE_BY_SIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Both as float32."""
    if SIDE_BY_SIDE:  # one load of whole lines
        element = 2 * first + tl.arange(0, 2 * BLOCK)
        both = tl.load(row_ptr + element, mask=element < 2 * features, other=0.0)
        return tl.split(tl.reshape(both.to(tl.float32), (BLOCK, 2)))
    feature = first + tl.arange(0, BLOCK)
    at = row_ptr + feature.to(tl.int64) * stride
    gate = tl.load(at, mask=feature < features, other=0.0)
    up = tl.load(at + kind, mask=feature < features, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


def reference(packed: Tensor) -> Tensor:
    """`[T, F, 2]` -> `[T, F]`."""
    gate, up = packed.unbind(-1)
    return F.silu(gate) * up


def backward_reference(dy: Tensor, packed: Tensor) -> Tensor:
    """The gradient of `packed`, `[T, F, 2]`."""
    gate, up = at_least_float32(packed).unbind(-1)
    sigmoid, dy = gate.sigmoid(), at_least_float32(dy)
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
    return torch.stack([dgate, dy * silu], -1).to(packed.dtype)


@torch.library.custom_op("megallama::swiglu", mutates_args=())
def _swiglu(packed: Tensor) -> Tensor:
    if not launches(packed):
        return reference(packed)
    rows, features, _ = packed.shape
    y = _like(packed, rows, features)
    if y.numel():
        _forward[(triton.cdiv(features, BLOCK) * rows,)](
            packed,
            y,
            features,
            *packed.stride(),
            SIDE_BY_SIDE=_side_by_side(packed),
            BLOCK=BLOCK,
            num_warps=WARPS,
            **OPTIONS,
        )
    return y


@torch.library.custom_op("megallama::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, packed: Tensor) -> Tensor:
    if not launches(packed):
        return backward_reference(dy, packed)
    rows, features, _ = packed.shape
    dpacked = _like(packed, rows, features, 2)
    if dpacked.numel():
        _backward[(triton.cdiv(features, BLOCK) * rows,)](
            dy,
            packed,
            dpacked,
            features,
            *dy.stride(),
            *packed.stride(),
            SIDE_BY_SIDE=_side_by_side(packed),
            BLOCK=BLOCK,
            num_warps=WARPS,
            **OPTIONS,
        )
    return dpacked


def _side_by_side(packed: Tensor) -> bool:
    return packed.stride()[1:] == (2, 1)


def _like(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device)


_swiglu.register_fake(lambda packed: _like(packed, *packed.shape[:2]))
_swiglu_backward.register_fake(lambda dy, packed: _like(packed, *packed.shape))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_swiglu(ctx: Any, dy: Tensor) -> Tensor:
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward_of_swiglu, setup_context=_keep)


def _no_model_flops(*_args: Any, **_kwargs: Any) -> int:
    return 0


register_flop_formula(torch.ops.megallama.swiglu)(_no_model_flops)
register_flop_formula(torch.ops.megallama.swiglu_backward)(_no_model_flops)


def swiglu(packed: Tensor) -> Tensor:
    """The fused op: `[T, F, 2]` with any strides -> `[T, F]`."""
    return _swiglu(packed)
