"""AdamW over sharded parameters, and the norm of a gradient that lies on many ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module

import torch
from megallama_kernels import adamw, grad_norm
from megallama_kernels.language import at_least_float32
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as torch_adamw

from megallama.config.schema import KernelsConfig, OptimizerConfig
from megallama.mesh import ProcessGroupManager
from megallama.model.kernels import implementation
from megallama.parallel.collectives import sum_over
from megallama.parallel.placements import placement

TIED = "embed.weight"
"""Global name of the weight that embedding and head may share."""
MOMENTS = ("exp_avg", "exp_avg_sq")

Update = Callable[..., None]
"""`megallama_kernels.adamw.adamw_`, or another with its signature."""


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) on this rank's shards; norm weights, which are
    one-dimensional, do not decay.

    Args:
        module: sharded, its parameters the master weights, or their high halves.
        config: its settings.
        update: steps many tensors at once.
        low: the masters' low halves by global name, if they are split.

    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        update: Update,
        low: Mapping[str, Tensor] | None = None,
    ) -> None:
        named = dict(module.named_parameters())
        matrices = [p for p in named.values() if p.ndim > 1]
        vectors = [p for p in named.values() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {})
        self.config, self.completed = config, 0
        self._update, self._named, self._split = update, named, low is not None
        for name, parameter in named.items():
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            for moment in MOMENTS:
                self.state[parameter][moment] = torch.zeros_like(parameter, dtype=wide)
            if low is not None:
                self.state[parameter]["low"] = _like(parameter, low[name])

    @torch.no_grad()
    def step(self, closure: None = None, *, lr: float = 0.0, clip: Tensor | None = None) -> None:  # type: ignore[override]
        """One update.

        Args:
            closure: none.
            lr: learning rate.
            clip: what gradients are multiplied by, `[]`.

        """
        assert closure is None
        assert clip is not None
        self.completed += 1
        for group in self.param_groups:
            parameters = group["params"]
            gradients = [_local(p.grad) for p in parameters]
            moments = [[_local(self.state[p][m]) for p in parameters] for m in MOMENTS]
            settings = {
                "clip": clip,
                "lr": lr,
                "beta1": self.config.beta1,
                "beta2": self.config.beta2,
                "eps": self.config.eps,
                "weight_decay": group["weight_decay"],
                "step": self.completed,
            }
            weights = [_local(p) for p in parameters]
            if self._split:
                low = [_local(self.state[p]["low"]) for p in parameters]
                adamw.adamw_split_(weights, low, gradients, *moments, **settings)
            else:
                self._update(weights, gradients, *moments, **settings)

    def canonical_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by global name, whatever runs the update and however masters
        are stored: float32 (or float64) weights and both moments. The weights of split masters are
        copies: 4 bytes a parameter for as long as they are held.
        """
        return dict(self._canonical())

    def _canonical(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named.items():
            state, whole = self.state[parameter], parameter.detach()
            if self._split:
                whole = torch.zeros_like(parameter, dtype=torch.float32)
                _local(whole).copy_(adamw.join(_local(parameter.detach()), _local(state["low"])))
            yield f"model.{name}", whole
            for moment in MOMENTS:
                yield f"optimizer.{name}.{moment}", state[moment]

    @torch.no_grad()
    def take(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on from a `canonical_state` that was filled in place, after `step` steps."""
        self.completed = step
        if not self._split:
            return
        for name, parameter in self._named.items():
            high, low = adamw.split(_local(state[f"model.{name}"]))
            _local(parameter).copy_(high)
            _local(self.state[parameter]["low"]).copy_(low)


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """A rank's part of a tensor that lies as a parameter does; it keeps its memory."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _local(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def fused_by_torch(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    clip: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Torch's fused AdamW. Clipping is a pass of its own, over the gradients, in place."""
    torch._foreach_mul_(gradients, clip)
    steps = torch.full((len(parameters),), step - 1.0, device=parameters[0].device)
    torch_adamw(
        parameters,
        gradients,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sqs=[],
        state_steps=list(steps.unbind()),
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def fused_by_apex(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    clip: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """The kernel of NVIDIA apex's FusedAdam, as that class calls it with `adam_w_mode`."""
    torch._foreach_mul_(gradients, clip)
    # An empty shard at the end of a list would keep the kernel from being launched.
    lists = [
        [x for x in tensors if x.numel()]
        for tensors in (gradients, parameters, exp_avg, exp_avg_sq)
    ]
    if not lists[0]:
        return
    apply = import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernel = import_module("amp_C").multi_tensor_adam
    overflow = torch.zeros(1, dtype=torch.int, device=parameters[0].device)
    decoupled = bias_correction = 1
    apply(
        kernel,
        overflow,
        lists,
        lr,
        beta1,
        beta2,
        eps,
        step,
        decoupled,
        bias_correction,
        weight_decay,
    )


_UPDATES: dict[str, Update] = {
    "torch": fused_by_torch,
    "triton": adamw.adamw_,
    "apex": fused_by_apex,
}
SquaredNorm = Callable[[Sequence[Tensor]], Tensor]
_NORMS: dict[str, SquaredNorm] = {
    "torch": lambda tensors: at_least_float32(torch.nn.utils.get_total_norm(tensors)).square(),
    "triton": grad_norm.squared_norm,
}


def build_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    kernels: KernelsConfig,
    device_type: str,
    low: Mapping[str, Tensor] | None,
) -> AdamW:
    """With the update that the config names; `low` as `AdamW` takes it."""
    return AdamW(module, config, _UPDATES[implementation(kernels.adamw, device_type)], low)


def choose_norm(kernels: KernelsConfig, device_type: str) -> SquaredNorm:
    """The squared norm of many tensors of one dtype."""
    return _NORMS[implementation(kernels.grad_norm, device_type)]


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
    gradients: dict[str, Tensor],
    groups: ProcessGroupManager,
    kv_heads: int,
    squared_norm: SquaredNorm,
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
    return squared_norm(counted)


def clip_coefficient(norm: Tensor, largest: float) -> Tensor:
    """What gradients are multiplied by so that their global norm is at most `largest` (Pascanu et
    al. 2013); 1 with `largest` 0.
    """
    if largest == 0:
        return torch.ones_like(norm)
    return (largest / (norm + 1e-6)).clamp(max=1.0)
