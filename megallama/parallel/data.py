"""Data parallelism: FSDP2 and HSDP (Zhao et al. 2023), and the precision policy.

FSDP wraps always, even over one rank: it is what turns the partial gradients of replicated weights
into sums. Gradients are summed, never averaged: the loss is already divided by the tokens of the
global batch.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megallama.model.llama import Llama

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


def hold_gradients(module: Llama, *, reshard: bool) -> None:
    """Before a step: no backward reduces gradients or frees weights until it is told to.

    With ZeRO-3 there is no room for whole gradients: every backward does, and shards accumulate.
    """
    assert isinstance(module, FSDPModule)
    module.set_is_last_backward(False)
    module.set_requires_gradient_sync(reshard)
    module.set_reshard_after_backward(reshard)


def release_gradients(module: Llama, part: int, *, last_of_rank: bool) -> None:
    """The next backward is the last of a part: reduce its gradients, once, and free its weights
    (Llama 3, section 3.3.2). A tied weight belongs to two parts and waits for the rank's last.
    """
    assert isinstance(module, FSDPModule)
    this = module.parts[part]
    released: list[nn.Module | None] = [module.layers[str(i)] for i in this.layers]
    released += [module.embed] if this.first else []
    released += [module.head] if this.last else []
    released += [module] if last_of_rank else []
    for child in released:
        if isinstance(child, FSDPModule):
            child.set_requires_gradient_sync(True, recurse=False)
            child.set_reshard_after_backward(True, recurse=False)
    module.set_is_last_backward(last_of_rank)


def free_gathered_weights(module: Llama) -> None:
    """Return a module to its sharded parameters, where no backward did: after evaluation."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
