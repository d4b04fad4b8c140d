"""What is timed: one pass of one op at one shape, by every implementation there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

OURS, EAGER, COMPILED, LIGER = "ours", "eager", "compile", "liger"
BFLOAT16_LIMIT = 2e-2
"""Of the largest element: a few roundings of 2^-8."""


def _itself(x: Any) -> Any:
    return x


class Run(NamedTuple):
    """One implementation of one pass."""

    prepare: Callable[[], Any]
    """What is not timed; its result goes to `run`."""
    run: Callable[[Any], Any]
    compared: Callable[[Any], Sequence[Tensor]] = _itself
    """What `run` returned, in the layout of `Case.expected`."""


@dataclass(frozen=True)
class Case:
    """One pass of one op at one shape."""

    op: str
    what: str
    shape: str
    expected: Sequence[Tensor]
    """What every run computes, from float64 or float32 arithmetic."""
    runs: Mapping[str, Run]
    bytes: float | None = None
    """That have to be moved; None where there is no floor to compare with."""
    flops: float = 0.0
    """Of matrix products that have to be computed."""
    limit: float = BFLOAT16_LIMIT
    """Largest difference from `expected` by which a run counts as right, of the largest element."""


class Way(NamedTuple):
    """One implementation of a differentiable op."""

    function: Callable[..., Tensor | Sequence[Tensor]]
    inputs: Callable[[], Sequence[Tensor]] | None = None
    """Made anew for each run, for a peer that writes into them or wants another layout."""
    gradients: Callable[[Sequence[Tensor]], Sequence[Tensor]] = _itself
    """Of `inputs`, in the layout of the case's own."""


def forward_and_backward(
    op: str,
    shape: str,
    ways: Mapping[str, Way],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    bytes_moved: tuple[float, float],
) -> Iterator[Case]:
    """Both passes of an elementwise op.

    Args:
        op: its name.
        shape: the model's name.
        ways: implementations of `inputs -> outputs`.
        inputs: all of them get a gradient.
        upstream: the gradient of each output.
        reference: what `ways` compute; called with float64.
        bytes_moved: of forward and of backward.

    """
    outputs, gradients = _exact(reference, inputs, upstream)
    forward = {name: forward_run(way, inputs) for name, way in ways.items()}
    yield Case(op, "forward", shape, outputs, forward, bytes_moved[0])
    backward = {name: backward_run(way, inputs, upstream) for name, way in ways.items()}
    yield Case(op, "backward", shape, gradients, backward, bytes_moved[1])


def forward_run(way: Way, inputs: Sequence[Tensor]) -> Run:
    """Forward as in training: it keeps what backward needs."""
    return Run(lambda: _leaves(way, inputs), lambda leaves: _listed(way.function(*leaves)))


def backward_run(way: Way, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> Run:
    """Backward of a forward that is not timed; upstream gradients are copies, for peers write into
    theirs.
    """

    def prepare() -> tuple[Sequence[Tensor], ...]:
        leaves = _leaves(way, inputs)
        outputs = _listed(way.function(*leaves))
        return outputs, leaves, [x.clone() for x in upstream]

    return Run(prepare, lambda state: torch.autograd.grad(*state), way.gradients)


def _exact(
    reference: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients by float64 arithmetic, kept in float32."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    outputs = _listed(reference(*leaves))
    gradients = torch.autograd.grad(outputs, leaves, [x.double() for x in upstream])
    return [x.detach().float() for x in outputs], [x.float() for x in gradients]


def _leaves(way: Way, inputs: Sequence[Tensor]) -> list[Tensor]:
    fresh = inputs if way.inputs is None else way.inputs()
    return [x.detach().requires_grad_() for x in fresh]


def _listed(x: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [x] if isinstance(x, Tensor) else x


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, over all tensors, of the largest error over the largest element."""
    worst = 0.0
    for x, exact in zip(found, expected, strict=True):
        assert x.shape == exact.shape, f"{tuple(x.shape)} in place of {tuple(exact.shape)}"
        error = (x.detach() - exact).abs().max() / exact.abs().max()
        worst = max(worst, error.item()) if error.isfinite() else float("inf")
    return worst


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """By Inductor for the very shapes it meets; on CPU traced only, which takes less time."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return torch.compile(function, backend=backend, dynamic=False)


@cache
def liger() -> ModuleType | None:
    """Liger's functional ops, or None where it cannot be imported."""
    try:
        import liger_kernel.transformers.functional as functional
    except ImportError:
        return None
    return functional
