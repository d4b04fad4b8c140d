"""Every collective of the forward and backward pass, by name.

They are torch's functional collectives: safe to recompute under activation checkpointing (in-place
ones corrupt gradients there) and traceable by torch.compile. Exceptions: a ring's passes, which
have no functional form and are not compiled, and the fused operations of `overlap.py`. Token
dimension first throughout.
A started collective returns a tensor that must pass through `finish` before it is read.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_ops = torch.ops._c10d_functional


def start_all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Begin `[T/n, ...]` -> `[T, ...]`, rank order along dimension 0."""
    return _ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)


def start_reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Begin `[T, ...]` -> `[T/n, ...]`, summed over the group."""
    return _ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)


def finish(x: Tensor) -> Tensor:
    """Wait for a started collective."""
    return _ops.wait_tensor(x)


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """`[T/n, ...]` -> `[T, ...]`."""
    return finish(start_all_gather(x, group))


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """`[T, ...]` -> `[T/n, ...]`, summed over the group."""
    return finish(start_reduce_scatter(x, group))


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """`[n, ...]`: the i-th part goes to rank i, and rank i's comes in its place."""
    x = x.contiguous()
    parts = [1] * group.size()
    return finish(_ops.all_to_all_single(x, parts, parts, group.group_name))


def all_reduce(x: Tensor, operation: str, group: ProcessGroup) -> Tensor:
    """`x` reduced over the group by `sum` or `max`; the argument is left alone."""
    return finish(_ops.all_reduce(x.contiguous(), operation, group.group_name))


def sum_over_world(x: Tensor) -> Tensor:
    """`x` summed over all ranks, in place."""
    dist.all_reduce(x)
    return x


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` summed over the group, in place."""
    dist.all_reduce(x, group=group)
    return x


class Passing(NamedTuple):
    """A block on its way around a ring."""

    works: list[dist.Work]
    leaving: Tensor
    """Kept until it has left."""
    arriving: Tensor


def start_pass(block: Tensor, group: ProcessGroup) -> Passing:
    """Begin to send a contiguous block to the next rank and to receive the previous rank's."""
    rank, size = group.rank(), group.size()
    arriving = torch.empty_like(block)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % size),
        ]
    )
    return Passing(works, block, arriving)


def finish_pass(passing: Passing | None) -> Tensor:
    """Wait for a block that was started."""
    assert passing is not None
    for work in passing.works:
        work.wait()
    return passing.arriving
