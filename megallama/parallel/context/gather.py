"""Context parallelism by gathering keys and values (Llama 3, section 3.3.2).

The key/value projection of all ranks is gathered once per block, while queries are projected.
Keys are rotated after that, each rank all of them: they are few under grouped-query attention.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megallama.model.attention import AttentionPlan
from megallama.parallel.collectives import (
    all_gather,
    finish,
    start_all_gather,
    start_reduce_scatter,
)


@dataclass(frozen=True)
class GatherPlan(AttentionPlan):
    """A plan for queries of this rank and keys of the whole stream."""

    stream_order: Tensor
    """`[S]`: where each token of the stream is among the gathered ones."""
    rank_order: Tensor
    """`[S]`: the inverse."""


class _ProjectAndGather(torch.autograd.Function):
    """Forward: gather `x [T/t, d]` over tensor ranks; project keys and values and start gathering
    them over context ranks; project queries meanwhile.

    Backward mirrors it: key and value gradients are reduce-scattered while queries' are taken.
    The tensor group may be None: x is `[T, d]` then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tensor: ProcessGroup | None,
        context: ProcessGroup,
        plan: GatherPlan,
        x: Tensor,
        wq: Tensor,
        wkv: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.tensor, ctx.context, ctx.plan = tensor, context, plan
        ctx.save_for_backward(x, wq, wkv)
        tokens = all_gather(x, tensor) if tensor else x
        kv = start_all_gather(F.linear(tokens, wkv), context)
        q = F.linear(tokens, wq)
        return q, finish(kv).index_select(0, plan.stream_order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, wq, wkv = ctx.saved_tensors
        grad_q, grad_gathered = grads
        by_rank = grad_gathered.index_select(0, ctx.plan.rank_order)
        scattered = start_reduce_scatter(by_rank, ctx.context)
        tokens = all_gather(x, ctx.tensor) if ctx.tensor else x
        grad_x = grad_q @ wq
        grad_wq = grad_q.t() @ tokens
        grad_kv = finish(scattered)
        grad_x = torch.addmm(grad_x, grad_kv, wkv)
        scattered = start_reduce_scatter(grad_x, ctx.tensor) if ctx.tensor else grad_x
        grad_wkv = grad_kv.t() @ tokens
        grad_x = finish(scattered) if ctx.tensor else grad_x
        return None, None, None, grad_x, grad_wq, grad_wkv


def enter_attention(
    tensor: ProcessGroup | None,
    context: ProcessGroup,
    x: Tensor,
    wq: Tensor,
    wkv: Tensor,
    plan: AttentionPlan,
) -> tuple[Tensor, ...]:
    """`Seams.enter_attention`: keys and values come back for the whole stream, in its order."""
    return _ProjectAndGather.apply(tensor, context, plan, x, wq, wkv)


def gather_seams(tensor: ProcessGroup | None, context: ProcessGroup) -> dict[str, object]:
    """The seams that this method fills, by field name."""
    return {"enter_attention": partial(enter_attention, tensor, context)}
