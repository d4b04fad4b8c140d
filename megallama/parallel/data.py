"""Data parallelism: FSDP2 and HSDP (Zhao et al. 2023), and the precision policy.

FSDP wraps always, even over one rank: it is what turns the partial gradients of replicated weights
into sums. Gradients are summed, never averaged: the loss is already divided by the tokens of the
global batch.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megallama.model.llama import Llama

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
MASTER_DTYPE = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


def shard_over_data(
    stage: Llama, mesh: DeviceMesh, *, precision: str, reshard_after_forward: bool
) -> None:
    """Shard a stage's parameters over the mesh's last dimension, block by block.

    Args:
        stage: on the meta device, tensor parallelism already applied.
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
    for block in stage.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    tied = stage.embed is not None and stage.head is not None
    tied = tied and stage.embed.weight is stage.head.weight  # type: ignore[union-attr]
    for end in (stage.embed, stage.head):
        if end is not None and not tied:
            fully_shard(end, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(stage, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def synchronize_gradients(stage: Llama, *, last: bool, reshard: bool) -> None:
    """Say what the next backward of a stage does with gradients.

    Weights that stay gathered accumulate whole gradients in fp32 and reduce them once, on the
    stage's last backward (Llama 3, section 3.3.2). With ZeRO-3 there is no room for whole
    gradients: each backward reduces, and the shards accumulate.
    """
    assert isinstance(stage, FSDPModule)
    stage.set_is_last_backward(last)
    stage.set_requires_gradient_sync(last or reshard)
    stage.set_reshard_after_backward(last or reshard)


def free_gathered_weights(stage: Llama) -> None:
    """Return a stage to its sharded parameters, where no backward did: after evaluation."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
