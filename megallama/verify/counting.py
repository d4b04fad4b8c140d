"""Counts the collectives and messages of a step as they reach torch.distributed.

It sees all of them, FSDP's and DTensor's as well as ours.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megallama.mesh import ProcessGroupManager

KINDS = {
    "all_gather_into_tensor": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "all_reduce": "all-reduce",
    "allreduce_": "all-reduce",
    "all_to_all_single": "all-to-all",
    "send": "message",
}
NOT_COUNTED = ("wait_tensor", "recv_", "_wrap_tensor_autograd")


class CommunicationCounter(TorchDispatchMode):
    """Within it, `calls[axis, kind]` and `bytes[axis, kind]` grow with every call of this rank.

    Bytes are those of the whole buffer: what an all-gather yields, a reduce-scatter takes, an
    all-reduce reduces, or a message carries. Messages are counted where they are sent.
    """

    def __init__(self, groups: ProcessGroupManager) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self._axes = _labels(groups)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.overloadpacket.__name__, args, out)
        return out

    def _count(self, operation: str, args: Any, out: Any) -> None:
        if operation in NOT_COUNTED:
            return
        axis = self._axes.get(_group_name(args), "other")
        key = (axis, KINDS.get(operation, operation))
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
        self.calls[key] += 1
        self.bytes[key] += max((t.numel() * t.element_size() for t in tensors), default=0)


def _labels(groups: ProcessGroupManager) -> dict[str, str]:
    """Names of process groups to axes: to all of them where axes have the same ranks and share a
    group, `world, pipeline` for one.
    """
    axes: dict[str, list[str]] = {}
    for group, axis in _axis_names(groups):
        axes.setdefault(group, []).append(axis)
    shared = {axis: ", ".join(names) for names in axes.values() if len(names) > 1 for axis in names}
    return {group: shared.get(names[0], names[0]) for group, names in axes.items()}


def _axis_names(groups: ProcessGroupManager) -> Iterator[tuple[str, str]]:
    """Names of process groups and what they serve."""
    yield dist.group.WORLD.group_name, "world"  # type: ignore[union-attr]
    yield groups.data.group.group_name, "data"
    sharding = groups.fsdp_mesh.ndim - 1
    if sharding:
        yield groups.fsdp_mesh.get_group(0).group_name, "data_replicate"
    if groups.data_shard.size * groups.context.size > 1:
        yield groups.fsdp_mesh.get_group(sharding).group_name, "data_shard"
    for name in ("context", "tensor", "pipeline"):
        axis = getattr(groups, name)
        if axis.size > 1:
            yield axis.group.group_name, name
    channels = (groups.pipeline_gradients, groups.pipeline_wrap, groups.pipeline_wrap_gradients)
    yield from {group.group_name: "pipeline" for group in channels}.items()
    if groups.tied_embedding is not None:
        yield groups.tied_embedding.group_name, "pipeline"


def _group_name(args: Any) -> str:
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(leaf).group_name
            except RuntimeError:  # a ReduceOp is one as well
                continue
    names = [leaf for leaf in tree_leaves(args) if isinstance(leaf, str)]
    return names[-1] if names else ""
