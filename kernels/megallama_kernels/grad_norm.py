"""The squared norm of many tensors in one launch.

Each program sums the squares of one chunk of one tensor in float32 and writes that sum; the sums
are then added in a fixed order, so the same tensors always have the same norm. Moves one element
per element.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megallama_kernels.language import OPTIONS, at_least_float32, jit, launches, next_power_of_2, tl
from megallama_kernels.multi_tensor import addresses, chunks, element_type

CHUNK = 65536
"""Elements of a program."""
BLOCK = 4096
"""Elements of one turn of a program's loop: two 128-bit loads a thread of bfloat16."""
WARPS = 8


@jit
def _sum_squares(
    addresses_ptr,
    chunks_ptr,
    partial_ptr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 3 * program)
    offset = tl.load(chunks_ptr + 3 * program + 1)
    length = tl.load(chunks_ptr + 3 * program + 2).to(tl.int32)
    x_ptr = tl.load(addresses_ptr + tensor).to(tl.pointer_type(ELEMENT)) + offset
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    # Positions are summed before they meet the pointer: Triton forgets the alignment of a pointer
    # when it merges two additions to it.
    whole = length // BLOCK * BLOCK
    for first in tl.range(0, whole, BLOCK):
        x = tl.load(x_ptr + (first + column)).to(tl.float32)
        total += x * x
    if whole < length:  # apart, because a mask of any length would narrow every load
        at = whole + column
        x = tl.load(x_ptr + at, mask=at < length, other=0.0).to(tl.float32)
        total += x * x
    tl.store(partial_ptr + program, tl.sum(total, 0))


def reference(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, in float32, or in float64 of float64 tensors."""
    return torch.stack([at_least_float32(x).square().sum() for x in tensors]).sum()


def launch(tensors: Sequence[Tensor], chunk: int = CHUNK) -> Tensor:
    """Sum by the kernel, `chunk` elements (a multiple of 16) a program."""
    pieces = chunks(tuple(x.numel() for x in tensors), chunk, tensors[0].device)
    partial = torch.empty(len(pieces), dtype=torch.float32, device=tensors[0].device)
    if len(pieces) > 0:
        table, aligned = addresses([tensors])
        _sum_squares[(len(pieces),)](
            table,
            pieces,
            partial,
            ELEMENT=element_type(tensors[0]),
            ALIGNED=aligned,
            BLOCK=min(BLOCK, next_power_of_2(chunk)),
            num_warps=WARPS,
            **OPTIONS,
        )
    return partial.sum()


@torch.library.custom_op("megallama::squared_norm", mutates_args=())
def _squared_norm(tensors: list[Tensor]) -> Tensor:
    if not launches(tensors[0]):
        return reference(tensors)
    return launch([x.contiguous() for x in tensors])


@_squared_norm.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tensors[0].new_empty((), dtype=dtype)


def _no_model_flops(*_args: Any, **_kwargs: Any) -> int:
    return 0


register_flop_formula(torch.ops.megallama.squared_norm)(_no_model_flops)


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of at least one tensor, of one dtype and device, empty
    ones among them: a scalar in float32, or in float64 of float64 tensors.
    """
    return _squared_norm(list(tensors))
