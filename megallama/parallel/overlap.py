"""Tensor parallelism with each collective inside its matrix product, through symmetric memory.

torch's fused operations cut a product into pieces and move one piece between GPUs that see each
other's memory (NVLink) while they compute the next (Jangda et al. 2022). Shapes and results are
those of `tensor.py`; sums are taken in another order.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megallama.model.attention import AttentionPlan
from megallama.parallel.collectives import all_gather

_ops = torch.ops.symm_mem


def _gather_and_multiply(
    x: Tensor, matrices: list[Tensor], group: ProcessGroup
) -> tuple[Tensor, list[Tensor]]:
    """`x [T/t, n]` gathered, and its products with each `[n, m]`."""
    gathered, products = _ops.fused_all_gather_matmul(x.contiguous(), matrices, 0, group.group_name)
    return gathered, products


def _multiply_and_scatter(x: Tensor, matrix: Tensor, group: ProcessGroup) -> Tensor:
    """`x [T, n]` times `[n, m]`, summed over the group, this rank's rows `[T/t, m]`."""
    scattered: Tensor = _ops.fused_matmul_reduce_scatter(
        x.contiguous(), matrix, "sum", 0, group.group_name
    )
    return scattered


class _Enter(torch.autograd.Function):
    """`Seams.enter`. As there, gathered tokens are not saved."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(x, *weights)
        _, products = _gather_and_multiply(x, [weight.t() for weight in weights], group)
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad_x = _multiply_and_scatter(torch.cat(grads, dim=1), torch.cat(weights), ctx.group)
        gathered = all_gather(x, ctx.group)
        return None, grad_x, *(grad.t() @ gathered for grad in grads)


class _Leave(torch.autograd.Function):
    """`Seams.leave`."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor, weight: Tensor) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x, weight)
        return _multiply_and_scatter(x, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gathered, (grad_x,) = _gather_and_multiply(grads[0], [weight], ctx.group)
        return None, grad_x, gathered.t() @ x


def enter(group: ProcessGroup, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`Seams.enter`: one all-gather of `[T/t, d]`, inside the products."""
    return _Enter.apply(group, x, *weights)


def enter_attention(
    group: ProcessGroup, x: Tensor, wq: Tensor, wkv: Tensor, _plan: AttentionPlan
) -> tuple[Tensor, ...]:
    """`Seams.enter_attention`, likewise."""
    return enter(group, x, wq, wkv)


def leave(group: ProcessGroup, x: Tensor, weight: Tensor) -> Tensor:
    """`Seams.leave`: one reduce-scatter of `[T, d]`, inside the product."""
    return _Leave.apply(group, x, weight)


def overlap_seams(group: ProcessGroup) -> dict[str, object]:
    """The seams that overlapping fills, by field name, over those of `tensor.py`."""
    return {
        "enter": partial(enter, group),
        "enter_attention": partial(enter_attention, group),
        "leave": partial(leave, group),
    }
