"""AdamW over sharded parameters, and the norm of a gradient that lies on many ranks."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from megallama.config.schema import OptimizerConfig
from megallama.mesh import ProcessGroupManager
from megallama.model.precision import at_least_float32
from megallama.parallel.collectives import sum_over
from megallama.parallel.placements import placement

TIED = "embed.weight"
"""Global name of the weight that embedding and head may share."""


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW, fused; norm weights (one-dimensional) do not decay. The step sets the rate."""
    parameters = list(module.parameters())
    groups = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: AdamW, lr: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def local_gradients(module: nn.Module) -> dict[str, Tensor]:
    """This rank's shard of every gradient, by global name."""
    gradients = {}
    for name, parameter in module.named_parameters():
        assert isinstance(parameter.grad, DTensor), f"{name} has no gradient"
        gradients[name] = parameter.grad.to_local()
    return gradients


def sum_tied_gradient(gradients: dict[str, Tensor], groups: ProcessGroupManager) -> None:
    """Add up, in place, the gradients of the one weight of embedding and head, where a pipeline's
    first and last rank each hold a copy of it.
    """
    if groups.tied_embedding is not None:
        sum_over(gradients[TIED], groups.tied_embedding)


def squared_norm_share(
    gradients: dict[str, Tensor], groups: ProcessGroupManager, kv_heads: int
) -> Tensor:
    """This rank's share of the squared norm of the global gradient; the shares of all ranks add up.

    Every element of the gradient counts once in the world: copies on other replicas are left out,
    and so are copies of replicated weights on all tensor ranks but the first, and of a tied weight
    on all pipeline ranks but the first.
    """
    tensor = groups.tensor

    def counts(name: str) -> bool:
        if name == TIED and groups.pipeline.rank > 0:
            return False
        sharded = placement(name, kv_heads=kv_heads, tensor=tensor.size).shard_dim is not None
        return (sharded or tensor.rank == 0) and groups.data_replicate.rank == 0

    counted = [gradient for name, gradient in gradients.items() if counts(name)]
    if not counted:
        return at_least_float32(next(iter(gradients.values())).new_zeros(()))
    return at_least_float32(torch.nn.utils.get_total_norm(counted)).square()


def clip(gradients: dict[str, Tensor], norm: Tensor, largest: float) -> None:
    """Scale gradients so that their global norm is at most `largest` (Pascanu et al. 2013)."""
    coefficient = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(list(gradients.values()), coefficient)
