"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022).

Between attention and feed-forward each rank holds `[T/t, d]`, a slice of the tokens. `enter`
gathers the tokens and projects them onto this rank's features; `leave` projects back and scatters
the sum.
Gathered tokens are never saved: backward gathers them again, since they would dominate the memory
of activations.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megallama_kernels.linear_cross_entropy import LossOps, loss_and_gradients, scaled
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from megallama.config.schema import LOSS_CHUNK
from megallama.mesh import Axis, ProcessGroupManager
from megallama.model.attention import AttentionPlan
from megallama.parallel.collectives import (
    all_gather,
    finish,
    reduce_scatter,
    start_all_gather,
    start_reduce_scatter,
)
from megallama.parallel.placements import Placement, placement


class _GatherAndProject(torch.autograd.Function):
    """Forward: all-gather `x [T/t, d]`, then `[T, d]` times each weight `[n/t, d]`.

    Backward: tokens are gathered again while the gradient of x is computed, and that gradient is
    reduce-scattered while the weights' gradients are computed.
    """

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(x, *weights)
        gathered = all_gather(x, group)
        return tuple(F.linear(gathered, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gathered = start_all_gather(x, ctx.group)
        grad_x = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x = torch.addmm(grad_x, grad, weight)
        gathered = finish(gathered)  # before the next starts: one in flight in a group at a time
        scattered = start_reduce_scatter(grad_x, ctx.group)
        grad_weights = [grad.t() @ gathered for grad in grads]
        return None, finish(scattered), *grad_weights


class _ReduceScatterTokens(torch.autograd.Function):
    """Forward: `[T, d]` -> `[T/t, d]`, summed over the group. Backward: all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(grad, ctx.group), None


class _GatherAndReturn(torch.autograd.Function):
    """Forward: all-gather `x [T/t, d]`, find the loss and its gradients, reduce-scatter that of x.
    Backward only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, find: Callable[..., Any], group: ProcessGroup
    ) -> Tensor:
        found = find(all_gather(x, group), weight, gradients=True)
        ctx.save_for_backward(reduce_scatter(found.dx, group), found.dweight)
        ctx.dtype = weight.dtype
        return found.loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        of_weight = scaled(dweight, grads[0], ctx.dtype)
        return scaled(dx, grads[0], dx.dtype), of_weight, None, None


def _local_labels(labels: Tensor, columns: range) -> tuple[Tensor, Tensor]:
    """Which labels lie in this rank's columns, and the column of each (0 where it does not)."""
    mine = (labels >= columns.start) & (labels < columns.stop)
    return mine, torch.where(mine, labels - columns.start, 0)


def enter(group: ProcessGroup, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`Seams.enter` over tensor ranks: one all-gather of `[T/t, d]`."""
    return _GatherAndProject.apply(group, x, *weights)


def enter_attention(
    group: ProcessGroup, x: Tensor, wq: Tensor, wkv: Tensor, _plan: AttentionPlan
) -> tuple[Tensor, ...]:
    """`Seams.enter_attention` over tensor ranks."""
    return enter(group, x, wq, wkv)


def leave(group: ProcessGroup, x: Tensor, weight: Tensor) -> Tensor:
    """`Seams.leave` over tensor ranks: one reduce-scatter of `[T, d]`."""
    return _ReduceScatterTokens.apply(F.linear(x, weight), group)


def embed(axis: Axis, tokens: Tensor, weight: Tensor) -> Tensor:
    """`Seams.embed`, the vocabulary's rows over tensor ranks: one reduce-scatter of `[T, d]`."""
    columns = _columns(axis, weight)
    mine, row = _local_labels(tokens, columns)
    return _ReduceScatterTokens.apply(F.embedding(row, weight) * mine[:, None], axis.group)


def loss(
    axis: Axis,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    vocab: int,
    ops: LossOps,
) -> Tensor:
    """`Seams.loss` with the vocabulary's rows over tensor ranks.

    The logits are never gathered: for each chunk of tokens ranks exchange the largest logit, the
    sum of exponentials and the target's logit in one all-gather of `[3, T]`.
    """
    find = partial(
        loss_and_gradients,
        labels=labels,
        scale=scale,
        vocab=vocab,
        first=_columns(axis, weight).start,
        exchange=lambda statistics: all_gather(statistics[None], axis.group),
        ops=ops,
        chunk_rows=LOSS_CHUNK,
    )
    if not torch.is_grad_enabled():
        return find(all_gather(x, axis.group), weight, gradients=False).loss
    return _GatherAndReturn.apply(x, weight, find, axis.group)


def _columns(axis: Axis, weight: Tensor) -> range:
    return range(axis.rank * weight.shape[0], (axis.rank + 1) * weight.shape[0])


def local(axis: Axis, kv_heads: int, name: str, parameter: Tensor) -> Tensor:
    """`Seams.local`: the part of a parameter this rank computes with, and how its gradient returns.

    A replicated parameter's gradient is marked as a partial sum; FSDP adds it up over the tensor
    ranks before it reduces over data ranks.
    """
    assert isinstance(parameter, DTensor)
    layout = placement(name, kv_heads=kv_heads, tensor=axis.size)
    if layout.shard_dim is not None:
        return parameter.to_local()
    whole = parameter.to_local(grad_placements=[Partial()])
    if layout.heads_per_rank is None:
        return whole
    head = kv_head_of(axis, layout)
    rows = whole.shape[0] // kv_heads
    return whole[head * rows : (head + 1) * rows]


def kv_head_of(axis: Axis, layout: Placement) -> int:
    """The key/value head that a rank's query heads share, when there are more ranks than heads."""
    assert layout.heads_per_rank is not None
    kv_heads, tensor = layout.heads_per_rank
    return axis.rank * kv_heads // tensor


def tensor_seams(axis: Axis, kv_heads: int) -> dict[str, object]:
    """The seams that tensor parallelism fills, by field name."""
    return {
        "local": partial(local, axis, kv_heads),
        "enter": partial(enter, axis.group),
        "enter_attention": partial(enter_attention, axis.group),
        "leave": partial(leave, axis.group),
        "embed": partial(embed, axis),
        "loss": partial(loss, axis),
    }


def shard_over_tensor(module: torch.nn.Module, groups: ProcessGroupManager, kv_heads: int) -> None:
    """Replace every parameter of a module on the meta device by a DTensor over the tensor mesh.

    A weight that two modules share stays shared.
    """
    split = {
        parameter: _as_dtensor(name, parameter, groups, kv_heads)
        for name, parameter in module.named_parameters()
    }
    for child in module.modules():
        for leaf, parameter in list(child.named_parameters(recurse=False)):
            setattr(child, leaf, split[parameter])


def _as_dtensor(
    name: str, parameter: Tensor, groups: ProcessGroupManager, kv_heads: int
) -> torch.nn.Parameter:
    size = groups.tensor.size
    dim = placement(name, kv_heads=kv_heads, tensor=size).shard_dim
    data = parameter.detach()
    if dim is not None:
        data = data.narrow(dim, 0, parameter.shape[dim] // size).contiguous()
    layout = Replicate() if dim is None else Shard(dim)
    dtensor = DTensor.from_local(data, groups.tensor_mesh, [layout], run_check=False)
    return torch.nn.Parameter(dtensor)
