"""Data parallelism: FSDP2 and HSDP (Zhao et al. 2023), and the precision policy.

FSDP wraps always, even over one rank: it is what turns the partial gradients of replicated weights
into sums. Gradients are summed, never averaged: the loss is already divided by the tokens of the
global batch.
"""

from itertools import pairwise

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megallama.model.llama import Llama, Part

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
MASTER_DTYPE = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


def shard_over_data(
    module: Llama, mesh: DeviceMesh, *, precision: str, reshard_after_forward: bool
) -> None:
    """Shard a rank's parameters over the mesh's last dimension, block by block.

    Args:
        module: on the meta device, tensor parallelism already applied.
        mesh: 1-D (FSDP) or 2-D (replicate x shard).
        precision: `bf16` gathers and computes in bf16, accumulates and reduces over data in fp32.
        reshard_after_forward: free each block's gathered weights until backward (ZeRO-3).

    """
    policy = (
        MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if precision == "bf16"
        else MixedPrecisionPolicy(cast_forward_inputs=False)
    )
    for block in module.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    tied = module.embed is not None and module.head is not None
    tied = tied and module.embed.weight is module.head.weight  # type: ignore[union-attr]
    for end in (module.embed, module.head):
        if end is not None and not tied:
            fully_shard(end, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.set_gradient_divide_factor(1.0)
            child.set_force_sum_reduction_for_comms(True)
    for part in module.parts:
        _prefetch_along(_wrapped_in_order(module, part))


def _wrapped_in_order(module: Llama, part: Part) -> list[FSDPModule]:
    children: list[object] = [module.embed] * part.first
    children += [module.layers[str(i)] for i in part.layers]
    children += [module.head] * part.last
    return [child for child in children if isinstance(child, FSDPModule)]


def _prefetch_along(modules: list[FSDPModule]) -> None:
    """Gather the next module's weights while one computes, the previous one's in backward.

    Left to itself, FSDP gathers in backward what ran before in forward: at the end of a
    micro-batch, the head's weights of the one before, for nothing.
    """
    for this, after in pairwise(modules):
        this.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([this])
    for first in modules[:1]:
        first.set_modules_to_backward_prefetch([first])  # nothing: it is there already


def prepare_backward(
    module: Llama, part: int, *, last_of_part: bool, last_of_rank: bool, zero3: bool
) -> None:
    """Say what the next backward, of one part, does with its gradients and gathered weights.

    Weights that stay gathered accumulate whole gradients in fp32 and reduce them once, with the
    part's last backward (Llama 3, section 3.3.2). With ZeRO-3 there is no room for whole gradients:
    each backward reduces, and the shards accumulate. Other parts are left alone. A tied weight
    belongs to two parts: it is the module's own, and without ZeRO-3 its turn comes with the rank's
    last.
    """
    assert isinstance(module, FSDPModule)
    mine = _wrapped_in_order(module, module.parts[part])
    for child in module.modules():
        if isinstance(child, FSDPModule) and child is not module:
            _reduce_next(child, child in mine and (zero3 or last_of_part))
    this = module.parts[part]
    _reduce_next(module, last_of_rank or (zero3 and (this.first or this.last)))
    module.set_is_last_backward(last_of_rank)


def _reduce_next(module: FSDPModule, wanted: bool) -> None:
    module.set_requires_gradient_sync(wanted, recurse=False)
    module.set_reshard_after_backward(wanted, recurse=False)


def free_gathered_weights(module: Llama) -> None:
    """Return a module to its sharded parameters, where no backward did: after evaluation."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
