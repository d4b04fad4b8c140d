"""RMSNorm (Zhang & Sennrich 2019), alone and fused with the addition of the residual before it.

With x̂ = x / sqrt(mean(x²) + eps) over the last dimension, y = x̂ · w. x̂ is rounded to the input's
dtype before the weight multiplies it, as Hugging Face Llama does; the residual sum is rounded
before it is normed. Backward, with g = dy · w: dx = (g - x̂ · mean(g · x̂)) / rms and dw = Σ dy · x̂.

Forward moves 2 elements per element of x (4 with a residual), backward 3 (4).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megallama_kernels.language import (
    OPTIONS,
    at_least_float32,
    compute_units,
    jit,
    launches,
    next_power_of_2,
    tl,
    triton,
)

TILE = 1024
"""Elements of a forward tile, at least: short rows share a program."""
LONG = 16384
"""Columns from which on backward with a residual reads a row twice, the second time from cache."""
PROGRAMS_PER_UNIT = 2
"""Of backward, whose programs go over rows and keep the weight's gradient in registers."""


@jit
def _forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    stream_ptr,
    rstd_ptr,
    rows,
    x_row,
    x_column,
    residual_row,
    residual_column,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    real = (column < COLUMNS) | (COLUMNS == BLOCK)  # all of them, and the compiler knows it
    inside = (row < rows) & real
    x = tl.load(x_ptr + row * x_row + column * x_column, mask=inside, other=0.0)
    if ADD:
        at = residual_ptr + row * residual_row + column * residual_column
        x = x.to(tl.float32) + tl.load(at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + row * COLUMNS + column, x, mask=inside)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / COLUMNS + EPS)
    tl.store(rstd_ptr + row, rstd[:, None], mask=row < rows)
    normed = (wide * rstd[:, None]).to(y_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + column, mask=real, other=0.0)
    y = normed.to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + row * COLUMNS + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    dy_ptr,
    dstream_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    dy_row,
    dy_column,
    dstream_row,
    dstream_column,
    x_row,
    x_column,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    LONG: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    real = (column < COLUMNS) | (COLUMNS == BLOCK)  # all of them, and the compiler knows it
    dweight = tl.zeros([1, BLOCK], dtype=tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & real
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        dy = tl.load(dy_ptr + row * dy_row + column * dy_column, mask=inside, other=0.0)
        x = tl.load(x_ptr + row * x_row + column * x_column, mask=inside, other=0.0)
        # Every time anew, from cache: across rows there is room for one row of registers only.
        weight = tl.load(weight_ptr + column, mask=real, other=0.0)
        normed = x.to(tl.float32) * rstd
        dweight += tl.sum(dy.to(tl.float32) * normed.to(x.dtype).to(tl.float32), 0)[None, :]
        g = dy.to(tl.float32) * weight.to(tl.float32)
        mean = (tl.sum(g * normed, 1) / COLUMNS)[:, None]
        if ADD and BLOCK >= LONG:  # registers do not hold all of it until here
            tl.debug_barrier()
            dy = tl.load(dy_ptr + row * dy_row + column * dy_column, mask=inside, other=0.0)
            x = tl.load(x_ptr + row * x_row + column * x_column, mask=inside, other=0.0)
            weight = tl.load(weight_ptr + column, mask=real, other=0.0)
            normed = x.to(tl.float32) * rstd
            g = dy.to(tl.float32) * weight.to(tl.float32)
        dx = (g - normed * mean) * rstd
        if ADD:
            at = dstream_ptr + row * dstream_row + column * dstream_column
            dx += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * COLUMNS + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * COLUMNS + column, dweight, mask=real)


def forward_options(columns: int) -> dict[str, int]:
    """Tile and warps of the forward kernel."""
    block = next_power_of_2(columns)
    return {
        "ROWS": max(1, TILE // block),
        "BLOCK": block,
        "num_warps": min(16, max(4, block // 512)),
    }


def backward_options(columns: int) -> dict[str, int]:
    """Tile and warps of the backward kernel: at most 32 elements of a row a thread, so that the
    weight's gradient stays in registers.
    """
    block = next_power_of_2(columns)
    return {
        "ROWS": max(1, TILE // block),
        "BLOCK": block,
        "num_warps": min(16, max(4, block // 512)),
    }


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., d]`, `weight [d]` -> `[..., d]`, in `x`'s dtype."""
    return _normed(x, _rstd(x, eps)) * weight


def add_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + residual` normed, and `x + residual`, both `[..., d]`."""
    stream = x + residual
    return reference(stream, weight, eps), stream


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(at_least_float32(x).square().mean(-1, keepdim=True) + eps)


def _normed(x: Tensor, rstd: Tensor) -> Tensor:
    return (at_least_float32(x) * rstd).to(x.dtype)


def backward_reference(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `x [T, d]` and of the weight `[d]`; `rstd [T]`."""
    wide, dy = at_least_float32(x), at_least_float32(dy)
    normed = wide * rstd[:, None]
    g = dy * weight
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd[:, None]
    if dstream is not None:
        dx = dx + dstream
    return dx.to(x.dtype), (dy * normed.to(x.dtype)).sum(0).to(weight.dtype)


@torch.library.custom_op("megallama::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not launches(x):
        return reference(x, weight, eps), _rstd(x, eps)[:, 0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _launch_forward(x, None, weight, y, None, rstd, eps)
    return y, rstd


@torch.library.custom_op("megallama::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not launches(x):
        y, stream = add_reference(x, residual, weight, eps)
        return y, stream, _rstd(stream, eps)[:, 0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream, rstd = torch.empty_like(y), torch.empty(len(x), dtype=torch.float32, device=x.device)
    _launch_forward(x, residual, weight, y, stream, rstd, eps)
    return y, stream, rstd


@torch.library.custom_op("megallama::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    if not launches(x):
        return backward_reference(dy, dstream, x, weight, rstd)
    rows, columns = x.shape
    options = backward_options(columns)
    tiles = triton.cdiv(rows, options["ROWS"])
    programs = max(1, min(tiles, PROGRAMS_PER_UNIT * compute_units(x)))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    extra = dy if dstream is None else dstream
    _backward[(programs,)](
        dy,
        extra,
        x,
        weight.contiguous(),
        rstd,
        dx,
        partial,
        rows,
        *dy.stride(),
        *extra.stride(),
        *x.stride(),
        COLUMNS=columns,
        LONG=LONG,
        ADD=dstream is not None,
        **options,
        **OPTIONS,
    )
    return dx, partial.sum(0).to(weight.dtype)


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    stream: Tensor | None,
    rstd: Tensor,
    eps: float,
) -> None:
    rows, columns = x.shape
    if rows == 0:
        return
    options = forward_options(columns)
    extra = x if residual is None else residual
    _forward[(triton.cdiv(rows, options["ROWS"]),)](
        x,
        extra,
        weight.contiguous(),
        y,
        y if stream is None else stream,
        rstd,
        rows,
        *x.stride(),
        *extra.stride(),
        EPS=eps,
        COLUMNS=columns,
        ADD=residual is not None,
        **options,
        **OPTIONS,
    )


def _rstd_like(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(len(x), dtype=dtype, device=x.device)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_rms_norm.register_fake(lambda x, weight, eps: (_like(x), _rstd_like(x)))
_add_rms_norm.register_fake(lambda x, residual, weight, eps: (_like(x), _like(x), _rstd_like(x)))
_rms_norm_backward.register_fake(lambda dy, dstream, x, weight, rstd: (_like(x), _like(weight)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _backward_of_norm(ctx: Any, dy: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = _rms_norm_backward(dy, None, *ctx.saved_tensors)
    return dx, dweight, None


def _backward_of_add(
    ctx: Any, dy: Tensor, dstream: Tensor | None, _drstd: Tensor
) -> tuple[Tensor | None, ...]:
    dx, dweight = _rms_norm_backward(dy, dstream, *ctx.saved_tensors)
    return dx, dx, dweight, None  # both addends have the same gradient


_rms_norm.register_autograd(_backward_of_norm, setup_context=_keep)
_add_rms_norm.register_autograd(_backward_of_add, setup_context=_keep_sum)


def _no_model_flops(*_args: Any, **_kwargs: Any) -> int:
    return 0


for _name in ("rms_norm", "add_rms_norm", "rms_norm_backward"):
    register_flop_formula(getattr(torch.ops.megallama, _name))(_no_model_flops)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The fused op: `x [T, d]` with any strides, `weight [d]` -> `[T, d]`."""
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The fused op of `add_reference`, `[T, d]` each."""
    y, stream, _ = _add_rms_norm(x, residual, weight, eps)
    return y, stream
