"""The head and its loss in chunks of rows: never more than one chunk of logits.

The gradients of a loss that is a plain sum are known as soon as a chunk's logits are, so forward
computes them too, in place of the logits, and backward only scales what it finds: three products a
chunk, as without fusion. What stays until backward is dx `[T, d]` and dW `[V, d]`, which
accumulates in float32 over chunks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama_kernels import cross_entropy
from megallama_kernels.cross_entropy import IGNORED_LABEL
from megallama_kernels.language import at_least_float32


class LossOps(NamedTuple):
    """The two passes over a chunk's logits: the fused ops, or their references."""

    statistics: Callable[[Tensor, Tensor, int, int], Tensor]
    gradient_: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], None]


FUSED = LossOps(cross_entropy.statistics, cross_entropy.gradient_)
PLAIN = LossOps(cross_entropy.statistics_reference, cross_entropy.gradient_reference_)


class LossAndGradients(NamedTuple):
    """Of one micro-batch on one rank."""

    loss: Tensor
    """`[]`, at least float32."""
    dx: Tensor | None
    """`[T, d]`, in x's dtype; partial where columns lie on several ranks."""
    dweight: Tensor | None
    """`[V, d]`, at least float32."""


def log_sum_exp_and_target(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """From statistics `[..., 3, R]` of one rank, or of several in front: `[R]` each."""
    largest, total, target = statistics.reshape(-1, 3, statistics.shape[-1]).unbind(1)
    top = largest.amax(0)
    return top + (total * (largest - top).exp()).sum(0).log(), target.sum(0)


def loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    vocab: int,
    first: int = 0,
    gradients: bool = True,
    exchange: Callable[[Tensor], Tensor] = lambda statistics: statistics,
    ops: LossOps = FUSED,
    chunk_rows: int,
) -> LossAndGradients:
    """`scale` times the sum of the cross-entropies of `x @ weight.T`, and its gradients.

    Args:
        x: `[T, d]`.
        weight: `[V, d]`, this rank's rows of the head.
        labels: `[T]` int64, `IGNORED_LABEL` where no loss is taken.
        scale: `[]`, at least float32.
        vocab: tokens that exist in all; rows of the head behind them are padding.
        first: the vocabulary's number of this rank's first row.
        gradients: whether they are wanted.
        exchange: statistics `[3, R]` of this rank -> `[ranks, 3, R]` of all that hold columns.
        ops: the passes over logits.
        chunk_rows: rows of a chunk; large ones, since dW is read and written once a chunk.

    """
    real = max(0, min(weight.shape[0], vocab - first))
    loss = at_least_float32(x.new_zeros(()))
    dx = torch.empty_like(x) if gradients else None
    dweight = at_least_float32(torch.zeros_like(weight)) if gradients else None
    for start in range(0, len(x), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = F.linear(x[rows], weight)
        mine = exchange(ops.statistics(logits, labels[rows], first, real))
        log_sum_exp, target = log_sum_exp_and_target(mine)
        counted = labels[rows] != IGNORED_LABEL
        loss += torch.where(counted, log_sum_exp - target, 0.0).sum()
        if dx is not None and dweight is not None:
            ops.gradient_(logits, labels[rows], log_sum_exp, scale, first, real)
            torch.mm(logits, weight, out=dx[rows])
            _add_product_(dweight, logits, x[rows])
    return LossAndGradients(loss * scale, dx, dweight)


def _add_product_(total: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """`total += dlogits.T @ x`, in `total`'s precision."""
    if total.dtype == x.dtype:
        torch.addmm(total, dlogits.t(), x, out=total)
    elif x.is_cuda:
        torch.addmm(total, dlogits.t(), x, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, dlogits.t().to(total.dtype), x.to(total.dtype), out=total)


class _LinearCrossEntropy(torch.autograd.Function):
    """`loss_and_gradients` with a gradient that comes from above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, find: Callable[..., Any]) -> Tensor:
        found = find(x, weight)
        ctx.save_for_backward(found.dx, found.dweight)
        ctx.dtype = weight.dtype
        return found.loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return scaled(dx, grads[0], dx.dtype), scaled(dweight, grads[0], ctx.dtype), None


def scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * by` in another dtype, in one pass."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, by, out=out)


def differentiable(find: Callable[..., LossAndGradients], x: Tensor, weight: Tensor) -> Tensor:
    """The loss that `find(x, weight, gradients=...)` yields, as autograd sees it."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not wanted:
        return find(x, weight, gradients=False).loss
    return _LinearCrossEntropy.apply(x, weight, partial(find, gradients=True))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    vocab: int,
    chunk_rows: int,
    ops: LossOps = FUSED,
) -> Tensor:
    """`scale` times the sum of the cross-entropies of `x @ weight.T`, `[]`, at least float32.

    Args:
        x: `[T, d]`.
        weight: `[V, d]`; rows from `vocab` on are padding.
        labels: `[T]` int64, `IGNORED_LABEL` where no loss is taken.
        scale: `[]`, not differentiated.
        vocab: tokens that exist.
        chunk_rows: rows of a chunk.
        ops: the passes over logits.

    """
    find = partial(
        loss_and_gradients,
        labels=labels,
        scale=scale,
        vocab=vocab,
        chunk_rows=chunk_rows,
        ops=ops,
    )
    return differentiable(find, x, weight)
