"""Which implementation computes each fused operation of the model.

Each name has the plain arithmetic (`torch`), the same compiled (`compile`), and the Triton kernel
(`triton`); all are in `megallama_kernels`. FusedRMSNorm of NVIDIA's apex is an adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from megallama_kernels import rms_norm as norms
from megallama_kernels import rope
from megallama_kernels import swiglu as swiglus
from megallama_kernels.linear_cross_entropy import FUSED, PLAIN, LossOps
from torch import Tensor

from megallama.config.schema import KernelsConfig

Enter = Callable[..., tuple[Tensor, ...]]
"""`Seams.enter`."""


def swiglu_of_two(enter: Enter, x: Tensor, w13: Tensor) -> Tensor:
    """`x [T, d]` through `w13 [F, 2, d]`, gate and up each by themselves -> `[T, F]`."""
    gate, up = enter(x, *w13.unbind(1))
    return F.silu(gate) * up


def swiglu_of_packed(
    activate: Callable[[Tensor], Tensor], enter: Enter, x: Tensor, w13: Tensor
) -> Tensor:
    """The same with one product and one activation `[T, F, 2]` -> `[T, F]`."""
    (packed,) = enter(x, w13.flatten(0, 1))
    return activate(packed.unflatten(-1, (-1, 2)))


def add_and_norm(
    norm: Callable[[Tensor, Tensor, float], Tensor],
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`x + residual` normed, and the sum, by a norm that does not add."""
    stream = x + residual
    return norm(stream, weight, eps), stream


@dataclass(frozen=True)
class Kernels:
    """One implementation of each operation."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = norms.reference
    """`(x [T, d], weight [d], eps)` -> `[T, d]`."""
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = (
        norms.add_reference
    )
    """`(x, residual, weight, eps)` -> the sum normed, and the sum, `[T, d]` each."""
    swiglu: Callable[[Enter, Tensor, Tensor], Tensor] = swiglu_of_two
    """`(enter, x [T, d], w13 [F, 2, d])` -> `[T, F]`."""
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = rope.reference
    """`(x [T, H, K], cos [S, K/2], sin, positions [T])` -> `[T, H, K]`."""
    loss: LossOps = PLAIN
    """The passes over the head's logits."""


def implementation(asked: str, device_type: str) -> str:
    """What a key of `kernels` means on a device."""
    auto = "triton" if device_type == "cuda" else "torch"
    return auto if asked == "auto" else asked


def choose_kernels(config: KernelsConfig, device_type: str) -> Kernels:
    """The implementations that a config names; `auto` is Triton on a GPU, torch elsewhere."""

    def named(asked: str) -> str:
        return implementation(asked, device_type)

    norm, add_norm = _NORMS[named(config.rms_norm)]()
    return Kernels(
        rms_norm=norm,
        add_rms_norm=add_norm,
        swiglu=_SWIGLUS[named(config.swiglu)](),
        rotate=_ROTATIONS[named(config.rotary)](),
        loss=_LOSSES[named(config.cross_entropy)](),
    )


def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function)


def _apex_norms() -> tuple[Any, Any]:
    """As `FusedRMSNorm` calls it, whose weight is a module's own."""
    fused = import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor = fused(x, weight, weight.shape, eps)
        return out

    return norm, partial(add_and_norm, norm)


def _compiled_loss() -> LossOps:
    statistics, gradient_ = PLAIN
    return LossOps(_compiled(statistics), _compiled(gradient_))


_NORMS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "torch": lambda: (norms.reference, norms.add_reference),
    "compile": lambda: (_compiled(norms.reference), _compiled(norms.add_reference)),
    "triton": lambda: (norms.rms_norm, norms.add_rms_norm),
    "apex": _apex_norms,
}
_SWIGLUS: dict[str, Callable[[], Any]] = {
    "torch": lambda: swiglu_of_two,
    "compile": lambda: partial(swiglu_of_packed, _compiled(swiglus.reference)),
    "triton": lambda: partial(swiglu_of_packed, swiglus.swiglu),
}
_ROTATIONS: dict[str, Callable[[], Any]] = {
    "torch": lambda: rope.reference,
    "compile": lambda: _compiled(rope.reference),
    "triton": lambda: rope.rotate,
}
_LOSSES: dict[str, Callable[[], LossOps]] = {
    "torch": lambda: PLAIN,
    "compile": _compiled_loss,
    "triton": lambda: FUSED,
}
