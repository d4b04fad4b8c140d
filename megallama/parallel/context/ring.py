"""Context parallelism by passing keys and values around a ring (Liu et al. 2023).

Each rank sends its block on to the next while it attends to it; partial results are added by their
log-sum-exps. A rank holds two blocks at a time, not all of them. Backward goes round once more and
repeats attention's forward; beside the blocks, their gradients go round, in at least float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megallama_kernels.language import at_least_float32
from torch import Tensor
from torch.distributed import ProcessGroup

from megallama.model.attention import AttentionPlan, Visible, attend_in_part
from megallama.parallel.collectives import Passing, finish_pass, start_pass


@dataclass(frozen=True)
class RingPlan(AttentionPlan):
    """A plan for queries of this rank and one rank's keys at a time."""

    visible: tuple[Visible, ...]
    """What this rank's queries see of the block that arrives n-th: its own first, then that of the
    rank before, and so on."""


class _RingAttention(torch.autograd.Function):
    """Forward: n-1 messages of keys and values. Backward: n-1 of these again, n of gradients."""

    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup, visible: Sequence[Visible], q: Tensor, kv: Tensor
    ) -> Tensor:
        ctx.group, ctx.visible = group, visible
        block = kv.contiguous()
        passing: Passing | None = None
        parts: tuple[Tensor, Tensor] | None = None
        for n, seen in enumerate(visible):
            if n + 1 < len(visible):
                passing = start_pass(block, group)
            part = attend_in_part(q, *_keys_and_values(block), seen)
            parts = part if parts is None else _add(parts, part)
            if n + 1 < len(visible):
                block, passing = finish_pass(passing), None  # it holds the block that left
        assert parts is not None
        out, log_sum_exp = parts
        ctx.save_for_backward(q, kv, out, log_sum_exp)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, log_sum_exp = ctx.saved_tensors
        grad = at_least_float32(grad)
        inner = (grad * out).sum(-1)
        grad_q = torch.zeros_like(out)
        block = kv.contiguous()
        passing: Passing | None = None
        grad_block = torch.zeros_like(at_least_float32(block))
        last = len(ctx.visible) - 1
        returning: Passing | None = None
        for n, seen in enumerate(ctx.visible):
            if n < last:
                passing = start_pass(block, ctx.group)
            of_q, of_block = _part_gradients(q, block, seen, grad, inner, log_sum_exp)
            grad_q += of_q
            if returning is not None:
                grad_block, returning = finish_pass(returning), None
            grad_block = grad_block + of_block
            returning = start_pass(grad_block, ctx.group)
            if n < last:
                block, passing = finish_pass(passing), None
        grad_block = finish_pass(returning)
        return None, None, grad_q.to(q.dtype), grad_block.to(kv.dtype)


def _keys_and_values(block: Tensor) -> tuple[Tensor, Tensor]:
    k, v = block.chunk(2, dim=1)
    return k, v


def _add(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two results `[T, H, K]` over different keys into one, by their log-sum-exps `[T, H]`."""
    total = torch.logaddexp(a[1], b[1])
    return sum(out * _share(part, total)[..., None] for out, part in (a, b)), total  # type: ignore[return-value]


def _share(part: Tensor, total: Tensor) -> Tensor:
    """What of the softmax's weight lies in a part; 0 where that part sees no key."""
    return torch.where(part == float("-inf"), 0.0, (part - total).exp())


@torch.enable_grad()
def _part_gradients(
    q: Tensor, block: Tensor, seen: Visible, grad: Tensor, inner: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the whole result through one block, which is attended to once more.

    The result is the sum of exp(part's lse - lse) · part's out, so that out gets that share of
    the gradient, and lse the share times (grad·part's out - grad·out).
    """
    q, block = (x.detach().requires_grad_() for x in (q, block))
    out, part = attend_in_part(q, *_keys_and_values(block), seen)
    share = _share(part.detach(), log_sum_exp)
    of_part = share * ((grad * out.detach()).sum(-1) - inner)
    gradients = torch.autograd.grad((out, part), (q, block), (share[..., None] * grad, of_part))
    of_q, of_block = (at_least_float32(g) for g in gradients)
    return of_q, of_block


@torch.compiler.disable
def attend_around(
    group: ProcessGroup, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan
) -> Tensor:
    """`Seams.attend`."""
    assert isinstance(plan, RingPlan)
    return _RingAttention.apply(group, plan.visible, q, torch.cat([k, v], dim=1))


def ring_seams(context: ProcessGroup) -> dict[str, object]:
    """The seams that this method fills, by field name."""
    return {"attend": partial(attend_around, context)}
