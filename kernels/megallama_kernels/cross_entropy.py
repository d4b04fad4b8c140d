"""Cross-entropy over logits whose columns may lie on several ranks.

Two passes over a rank's logits `[R, V]`. The first yields, for each row, the largest logit, the sum
of exponentials relative to it, and the label's logit: what ranks have to exchange, in one message.
The second turns logits into their gradient in place, softmax minus one at the label.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megallama_kernels.language import OPTIONS, at_least_float32, jit, launches, tl, triton

IGNORED_LABEL = -100
BLOCK = 4096
WARPS = 8
STATISTICS = 3


@jit
def _statistics(logits_ptr, label_ptr, out_ptr, rows, real, first, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    largest, total = float("-inf"), 0.0
    for start in range(0, real, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < real, other=float("-inf")).to(tl.float32)
        now = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(x - now), 0)
        largest = now
    at = tl.load(label_ptr + row) - first
    mine = (at >= 0) & (at < real)
    target = tl.load(logits_ptr + tl.where(mine, at, 0), mask=mine, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, largest)
    tl.store(out_ptr + rows + row, total)
    tl.store(out_ptr + 2 * rows + row, target)


@jit
def _gradient(
    logits_ptr,
    label_ptr,
    log_sum_exp_ptr,
    scale_ptr,
    columns,
    real,
    first,
    row_stride,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(columns, BLOCK)  # one dimension of the grid: others end at 65,535
    row = (tl.program_id(0) // tiles).to(tl.int64)
    logits_ptr += row * row_stride
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(label_ptr + row)
    scale = tl.load(scale_ptr)
    scale = tl.where(label == IGNORED, 0.0, scale)
    x = tl.load(logits_ptr + column, mask=column < real, other=float("-inf")).to(tl.float32)
    softmax = tl.exp(x - tl.load(log_sum_exp_ptr + row))
    gradient = (softmax - tl.where(column == label - first, 1.0, 0.0)) * scale
    gradient = tl.where(column < real, gradient, 0.0)
    tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < columns)


def statistics_reference(logits: Tensor, labels: Tensor, first: int, real: int) -> Tensor:
    """What ranks exchange, `[3, R]`, at least float32: largest logit, sum of exponentials relative
    to it, the label's logit or 0 where the label is another rank's.

    Args:
        logits: `[R, V]`, a rank's columns.
        labels: `[R]` int64, of the whole vocabulary, or `IGNORED_LABEL`.
        first: the vocabulary's number of the first column.
        real: columns that are tokens; those behind are padding.

    """
    wide = at_least_float32(logits[:, :real])
    if real == 0:
        nothing = wide.new_zeros(len(logits))
        return torch.stack([nothing - torch.inf, nothing, nothing])
    largest = wide.amax(-1)
    total = (wide - largest[:, None]).exp().sum(-1)
    mine, column = _local(labels, first, real)
    target = torch.where(mine, wide.gather(1, column[:, None])[:, 0], 0.0)
    return torch.stack([largest, total, target])


def gradient_reference_(
    logits: Tensor, labels: Tensor, log_sum_exp: Tensor, scale: Tensor, first: int, real: int
) -> None:
    """Turn a rank's logits into their gradient, in place; `scale []` is the loss's gradient."""
    wide = at_least_float32(logits)
    gradient = (wide - log_sum_exp[:, None]).exp()
    mine, column = _local(labels, first, real)
    gradient.scatter_add_(1, column[:, None], -mine.to(wide.dtype)[:, None])
    gradient *= torch.where(labels == IGNORED_LABEL, 0.0, scale)[:, None]
    gradient[:, real:] = 0
    logits.copy_(gradient)


def _local(labels: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in a rank's columns, and the column of each (0 where it does not)."""
    mine = (labels >= first) & (labels < first + real)
    return mine, torch.where(mine, labels - first, 0)


@torch.library.custom_op("megallama::cross_entropy_statistics", mutates_args=())
def statistics(logits: Tensor, labels: Tensor, first: int, real: int) -> Tensor:
    """The fused op of `statistics_reference`; rows of `logits` may have any stride."""
    if not launches(logits):
        return statistics_reference(logits, labels, first, real)
    rows = len(logits)
    out = logits.new_empty(STATISTICS, rows, dtype=torch.float32)
    if rows:
        _statistics[(rows,)](
            logits,
            labels,
            out,
            rows,
            real,
            first,
            _row_stride(logits),
            BLOCK=BLOCK,
            num_warps=WARPS,
            **OPTIONS,
        )
    return out


@torch.library.custom_op("megallama::cross_entropy_gradient_", mutates_args=("logits",))
def gradient_(
    logits: Tensor, labels: Tensor, log_sum_exp: Tensor, scale: Tensor, first: int, real: int
) -> None:
    """The fused op of `gradient_reference_`."""
    if not launches(logits):
        gradient_reference_(logits, labels, log_sum_exp, scale, first, real)
        return
    rows, columns = logits.shape
    if rows:
        _gradient[(triton.cdiv(columns, BLOCK) * rows,)](
            logits,
            labels,
            log_sum_exp,
            scale,
            columns,
            real,
            first,
            _row_stride(logits),
            IGNORED=IGNORED_LABEL,
            BLOCK=BLOCK,
            num_warps=WARPS,
            **OPTIONS,
        )


def _row_stride(logits: Tensor) -> int:
    assert logits.stride(1) == 1, "columns of logits lie next to each other: they come of a product"
    return logits.stride(0)


@statistics.register_fake
def _(logits: Tensor, labels: Tensor, first: int, real: int) -> Tensor:
    return at_least_float32(logits.new_empty(STATISTICS, len(logits)))


@gradient_.register_fake
def _(
    logits: Tensor, labels: Tensor, log_sum_exp: Tensor, scale: Tensor, first: int, real: int
) -> None:
    return None


def _no_model_flops(*_args: object, **_kwargs: object) -> int:
    return 0


register_flop_formula(torch.ops.megallama.cross_entropy_statistics)(_no_model_flops)
register_flop_formula(torch.ops.megallama.cross_entropy_gradient_)(_no_model_flops)
