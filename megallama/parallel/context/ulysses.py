"""Context parallelism by exchanging tokens for heads (DeepSpeed-Ulysses, Jacobs et al. 2023).

Between two all-to-alls each rank attends over the whole stream with its part of the heads. Where
there are more ranks than key/value heads, these are copied first.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megallama.model.attention import AttentionPlan, attend
from megallama.parallel.collectives import all_to_all


class _TokensToHeads(torch.autograd.Function):
    """`[T, H, K]` of this rank's tokens -> `[T*n, H/n, K]` of this rank's heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _tokens_to_heads(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _heads_to_tokens(grad, ctx.group), None


class _HeadsToTokens(torch.autograd.Function):
    """The inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _heads_to_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _tokens_to_heads(grad, ctx.group), None


def _tokens_to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    by_rank = x.unflatten(1, (group.size(), -1)).transpose(0, 1)
    return all_to_all(by_rank, group).flatten(0, 1)


def _heads_to_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    by_rank = all_to_all(x.unflatten(0, (group.size(), -1)), group)
    return by_rank.transpose(0, 1).flatten(1, 2)


def exchange_and_attend(
    group: ProcessGroup, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan
) -> Tensor:
    """`Seams.attend`; the plan is for the whole stream."""
    kv = torch.cat([k, v], dim=-1)
    copies = max(1, group.size() // kv.shape[1])
    kv = _TokensToHeads.apply(kv.repeat_interleave(copies, dim=1), group)
    k, v = kv.chunk(2, dim=-1)
    out = attend(_TokensToHeads.apply(q, group), k, v, plan)
    return _HeadsToTokens.apply(out, group)


def ulysses_seams(context: ProcessGroup) -> dict[str, object]:
    """The seams that this method fills, by field name."""
    return {"attend": partial(exchange_and_attend, context)}
