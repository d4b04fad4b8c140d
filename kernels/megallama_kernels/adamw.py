"""AdamW (Loshchilov & Hutter 2019) on many tensors in one launch, with the gradient's clipping in
it: no pass of its own.

With g the gradient times the clip coefficient, PyTorch's formulas at step t:
m = β₁ m + (1 - β₁) g, v = β₂ v + (1 - β₂) g²,
p = p - lr · decay · p - lr / (1 - β₁ᵗ) · m / (sqrt(v) / sqrt(1 - β₂ᵗ) + eps).

The master weight p is stored whole, in float32, or split: its high 16 bits are the bfloat16 weight
that the model computes with (truncated, not rounded), its low 16 bits are an int16 tensor, and both
together are the float32, bit for bit. Moves 28 bytes per parameter with float32 gradients, and 26
with bfloat16 ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megallama_kernels.language import OPTIONS, jit, launches, next_power_of_2, tl
from megallama_kernels.multi_tensor import addresses, chunks, element_type

CHUNK = 32768
"""Elements of a program."""
BLOCK = 1024
"""Elements of one turn of a program's loop: two 128-bit accesses a thread of each float32."""
TAIL = 128
"""Elements of one turn over what is left."""
WARPS = 4


@jit
def _at(row, column: tl.constexpr, offset, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    first = tl.load(row + column).to(tl.pointer_type(ELEMENT)) + offset
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first


@jit
def _update(
    master_ptr,
    low_ptr,
    gradient_ptr,
    m_ptr,
    v_ptr,
    inside,
    clip,
    shrink,
    rate,
    spread,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    master = tl.load(master_ptr, mask=inside)
    if SPLIT:
        low = tl.load(low_ptr, mask=inside)
        bits = (master.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
        master = bits.to(tl.float32, bitcast=True)
    g = tl.load(gradient_ptr, mask=inside).to(tl.float32) * clip
    m = tl.load(m_ptr, mask=inside)
    v = tl.load(v_ptr, mask=inside)
    m += (g - m) * (1.0 - BETA1)
    v = v * BETA2 + g * g * (1.0 - BETA2)
    master -= shrink * master + rate * (m / (tl.sqrt(v) / spread + EPS))
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    if SPLIT:
        bits = master.to(tl.int32, bitcast=True)
        tl.store(master_ptr, (bits >> 16).to(tl.int16), mask=inside)
        tl.store(low_ptr, bits.to(tl.int16), mask=inside)
    else:
        tl.store(master_ptr, master, mask=inside)


@jit
def _adamw(
    addresses_ptr,
    chunks_ptr,
    coefficients_ptr,
    GRADIENT: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 3 * program)
    offset = tl.load(chunks_ptr + 3 * program + 1)
    length = tl.load(chunks_ptr + 3 * program + 2).to(tl.int32)
    MASTER: tl.constexpr = tl.int16 if SPLIT else tl.float32
    row = addresses_ptr + tensor * (5 if SPLIT else 4)
    master_ptr = _at(row, 0, offset, MASTER, ALIGNED)
    gradient_ptr = _at(row, 1, offset, GRADIENT, ALIGNED)
    m_ptr = _at(row, 2, offset, tl.float32, ALIGNED)
    v_ptr = _at(row, 3, offset, tl.float32, ALIGNED)
    low_ptr = _at(row, 4 if SPLIT else 0, offset, MASTER, ALIGNED)
    clip = tl.load(coefficients_ptr).to(tl.float32)
    shrink = tl.load(coefficients_ptr + 1).to(tl.float32)
    rate = tl.load(coefficients_ptr + 2).to(tl.float32)
    spread = tl.load(coefficients_ptr + 3).to(tl.float32)
    column = tl.arange(0, BLOCK)
    # Positions are summed before they meet the pointers: Triton forgets the alignment of a pointer
    # when it merges two additions to it.
    whole = length // BLOCK * BLOCK
    for first in tl.range(0, whole, BLOCK):
        at = first + column
        _update(
            master_ptr + at,
            low_ptr + at,
            gradient_ptr + at,
            m_ptr + at,
            v_ptr + at,
            None,
            clip,
            shrink,
            rate,
            spread,
            BETA1,
            BETA2,
            EPS,
            SPLIT,
        )
    # Apart, because a mask of any length would narrow every access: an element a thread.
    for first in tl.range(whole, length, TAIL):
        at = first + tl.arange(0, TAIL)
        _update(
            master_ptr + at,
            low_ptr + at,
            gradient_ptr + at,
            m_ptr + at,
            v_ptr + at,
            at < length,
            clip,
            shrink,
            rate,
            spread,
            BETA1,
            BETA2,
            EPS,
            SPLIT,
        )


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The high 16 bits of a float32 tensor as bfloat16, and the low ones as int16."""
    bits = master.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 tensor that was split."""
    bits = (high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)
    return bits.view(torch.float32)


def reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Step one tensor, in its own precision; `coefficients` as the ops take them."""
    clip, shrink, rate, spread = coefficients.to(parameter.dtype).unbind()
    g = gradient.to(parameter.dtype) * clip
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    update = exp_avg / (exp_avg_sq.sqrt() / spread + eps)
    parameter.sub_(shrink * parameter + rate * update)


def launch(
    lists: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    chunk: int = CHUNK,
) -> None:
    """Step by the kernel, `chunk` elements (a multiple of 16) a program.

    `lists` are parameters, gradients and both moments; with a fifth, of the low halves, the
    parameters are the high ones.

    Raises:
        ValueError: a list has another dtype than the kernel writes, and as `addresses`.

    """
    halves = len(lists) == 5
    written = [torch.bfloat16 if halves else torch.float32, torch.float32, torch.float32]
    if [x[0].dtype for x in (lists[0], *lists[2:])] != written + [torch.int16] * halves:
        raise ValueError("parameters or moments are of a dtype that the kernel does not write")
    table, aligned = addresses(lists)
    pieces = chunks(tuple(x.numel() for x in lists[0]), chunk, lists[0][0].device)
    if len(pieces) == 0:
        return
    _adamw[(len(pieces),)](
        table,
        pieces,
        coefficients,
        GRADIENT=element_type(lists[1][0]),
        BETA1=beta1,
        BETA2=beta2,
        EPS=eps,
        SPLIT=halves,
        ALIGNED=aligned,
        BLOCK=min(BLOCK, next_power_of_2(chunk)),
        TAIL=TAIL,
        num_warps=WARPS,
        **OPTIONS,
    )


@torch.library.custom_op("megallama::adamw", mutates_args=("parameters", "exp_avg", "exp_avg_sq"))
def _whole(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    lists = (parameters, gradients, exp_avg, exp_avg_sq)
    if launches(parameters[0]):
        launch(lists, coefficients, beta1, beta2, eps)
        return
    for p, g, m, v in zip(*lists, strict=True):
        reference(p, g, m, v, coefficients, beta1, beta2, eps)


@torch.library.custom_op(
    "megallama::adamw_split", mutates_args=("high", "low", "exp_avg", "exp_avg_sq")
)
def _split(
    high: list[Tensor],
    low: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    if launches(high[0]):
        launch((high, gradients, exp_avg, exp_avg_sq, low), coefficients, beta1, beta2, eps)
        return
    for h, rest, g, m, v in zip(high, low, gradients, exp_avg, exp_avg_sq, strict=True):
        master = join(h, rest)
        reference(master, g, m, v, coefficients, beta1, beta2, eps)
        for half, new in zip((h, rest), split(master), strict=True):
            half.copy_(new)


def _no_model_flops(*_args: Any, **_kwargs: Any) -> int:
    return 0


for _name in ("adamw", "adamw_split"):
    register_flop_formula(getattr(torch.ops.megallama, _name))(_no_model_flops)


def _coefficients(
    clip: Tensor,
    lr: float | Tensor,
    step: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> Tensor:
    """What differs from step to step or between groups, in float64 `[4]` on the device: so neither
    compiles anew, and the host does not wait.
    """

    def scalar(x: float | Tensor) -> Tensor:
        if isinstance(x, Tensor):
            return x.to(clip.device, torch.float64)
        return torch.full((), x, dtype=torch.float64, device=clip.device)

    whole_rate, t = scalar(lr), scalar(step)
    rate, spread = whole_rate / (1 - beta1**t), (1 - beta2**t).sqrt()
    return torch.stack([scalar(clip), whole_rate * weight_decay, rate, spread])


@torch.no_grad()
def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    clip: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float | Tensor,
) -> None:
    """Step float32 (or float64) parameters and their moments, in place.

    Args:
        parameters: at least one, contiguous, all of one dtype and device.
        gradients: of the parameters' sizes and of one dtype, which need not be the parameters'.
        exp_avg: first moments, in the parameters' dtype.
        exp_avg_sq: second moments, in the parameters' dtype.
        clip: scalar that multiplies the gradients, on their device.
        lr: learning rate; a Python number compiles anew under `torch.compile` when it changes,
            a scalar tensor does not.
        beta1: decay of the first moments.
        beta2: decay of the second moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times `lr`.
        step: number of this step, from 1; number or tensor, as `lr`.

    """
    coefficients = _coefficients(clip, lr, step, beta1, beta2, weight_decay)
    lists = [list(x) for x in (parameters, gradients, exp_avg, exp_avg_sq)]
    _whole(*lists, coefficients, beta1, beta2, eps)


@torch.no_grad()
def adamw_split_(
    high: Sequence[Tensor],
    low: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    clip: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float | Tensor,
) -> None:
    """Step split masters, bfloat16 `high` and int16 `low`, with float32 moments; all else as in
    `adamw_`.
    """
    coefficients = _coefficients(clip, lr, step, beta1, beta2, weight_decay)
    lists = [list(x) for x in (high, low, gradients, exp_avg, exp_avg_sq)]
    _split(*lists, coefficients, beta1, beta2, eps)
