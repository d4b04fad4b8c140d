"""The gradient's norm and AdamW's step over one block's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from case import COMPILED, EAGER, OURS, Case, Run, compiled
from megallama_kernels import adamw, grad_norm
from shapes import Shape
from torch import Tensor
from torch.nn.utils import get_total_norm

FLOAT32_LIMIT = 1e-4
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, STEP, CLIP = 1e-2, 0.9, 0.95, 1e-8, 0.5, 10, 0.7
"""Rates at which a step shows in the parameters: a part of it left out is more than the limit."""
BYTES_WHOLE, BYTES_SPLIT = 28, 26
"""Of a parameter: itself, its gradient and two float32 moments read, all but the gradient written.
Split masters come with bfloat16 gradients, as in training.
"""


def gradient_norm(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Every element is read once."""
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [torch.randn(size, device=device, dtype=dtype) for size in shape.block_weights]
        exact = torch.stack([x.double().square().sum() for x in tensors]).sum().sqrt()
        one_graph = compiled(grad_norm.reference, device)
        runs = {
            OURS: _norm_run(partial(_root_of, grad_norm.squared_norm), tensors),
            EAGER: _norm_run(partial(_root_of, grad_norm.reference), tensors),
            COMPILED: _norm_run(partial(_root_of, one_graph), tensors),
            "get_total_norm": _norm_run(get_total_norm, tensors),
        }
        moved = sum(x.nbytes for x in tensors)
        name = str(dtype).removeprefix("torch.")
        yield Case("grad_norm", name, shape.name, [exact.float()], runs, moved)


def _root_of(squares: Callable[[Sequence[Tensor]], Tensor], x: Sequence[Tensor]) -> Tensor:
    return squares(x).sqrt()


def _norm_run(function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> Run:
    return Run(lambda: tensors, lambda x: [function(x)])


@dataclass(frozen=True)
class State:
    """What a step reads and writes; every implementation steps the same memory."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]

    @property
    def lists(self) -> tuple[Sequence[Tensor], ...]:
        """In the order in which steps take them."""
        return self.parameters, self.gradients, self.exp_avg, self.exp_avg_sq


def optimizer_step(shape: Shape, device: torch.device) -> Iterator[Case]:
    """AdamW with the gradient's clipping in it, over whole and over split master weights.

    `torch fused` is `torch._fused_adamw_`, which `torch.optim.AdamW(fused=True)` calls: alone, over
    gradients that were clipped before the clock started, and after a pass that clips them. Beside
    split masters it steps whole ones, with float32 gradients of the same values.
    """
    state = State(*([torch.empty(x, device=device) for x in shape.block_weights] for _ in range(4)))
    clip = torch.tensor(CLIP, device=device)
    rate, spread = LR / (1 - BETA1**STEP), (1 - BETA2**STEP) ** 0.5
    rest = torch.tensor([LR * WEIGHT_DECAY, rate, spread], dtype=torch.float64, device=device)
    coefficients = torch.cat([clip.double()[None], rest])
    steps = [torch.tensor(float(STEP), device=device) for _ in state.parameters]

    def all_tensors(lists: Sequence[Sequence[Tensor]]) -> None:
        for p, g, m, v in zip(*lists, strict=True):
            adamw.reference(p, g, m, v, coefficients, BETA1, BETA2, EPS)

    def ours(lists: Sequence[Sequence[Tensor]]) -> None:
        adamw.adamw_(*lists, clip=clip, step=STEP, **_RATES)

    def torch_fused(lists: Sequence[Sequence[Tensor]]) -> None:
        p, g, m, v = map(list, lists)
        torch._fused_adamw_(p, g, m, v, [], steps, amsgrad=False, maximize=False, **_RATES)

    def clip_and_torch_fused(lists: Sequence[Sequence[Tensor]]) -> None:
        torch._foreach_mul_(list(lists[1]), clip)
        torch_fused(lists)

    def reset() -> Sequence[Sequence[Tensor]]:
        _draw(state)
        return state.lists

    def reset_and_clip() -> Sequence[Sequence[Tensor]]:
        lists = reset()
        torch._foreach_mul_(list(lists[1]), clip)
        return lists

    fused = compiled(all_tensors, device)
    torch_runs = {
        "torch fused": _step_run(reset_and_clip, torch_fused),
        "clip, torch fused": _step_run(reset, clip_and_torch_fused),
    }
    whole = {
        OURS: _step_run(reset, ours),
        EAGER: _step_run(reset, all_tensors),
        COMPILED: _step_run(reset, fused),
        **torch_runs,
    }
    expected = _exact(reset(), coefficients)
    split = _split_runs(state, reset, clip, coefficients, device) | torch_runs
    for what, runs, moved in (("whole", whole, BYTES_WHOLE), ("split", split, BYTES_SPLIT)):
        total = moved * shape.block_parameters
        yield Case("adamw", what, shape.name, expected, runs, total, limit=FLOAT32_LIMIT)


_RATES: dict[str, Any] = {
    "lr": LR,
    "beta1": BETA1,
    "beta2": BETA2,
    "eps": EPS,
    "weight_decay": WEIGHT_DECAY,
}


def _split_runs(
    state: State,
    reset: Callable[[], Any],
    clip: Tensor,
    coefficients: Tensor,
    device: torch.device,
) -> dict[str, Run]:
    """Steps of split masters."""

    def ours(lists: Sequence[Sequence[Tensor]]) -> None:
        adamw.adamw_split_(*lists, clip=clip, step=STEP, **_RATES)

    def plain(lists: Sequence[Sequence[Tensor]]) -> None:
        for h, rest, g, m, v in zip(*lists, strict=True):
            master = adamw.join(h, rest)
            adamw.reference(master, g, m, v, coefficients, BETA1, BETA2, EPS)
            for half, new in zip((h, rest), adamw.split(master), strict=True):
                half.copy_(new)

    def reset_split() -> Sequence[Sequence[Tensor]]:
        reset()
        high, low = zip(*map(adamw.split, state.parameters), strict=True)
        narrow = [g.bfloat16() for g in state.gradients]
        return high, low, narrow, state.exp_avg, state.exp_avg_sq

    def compared(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        high, low, _, exp_avg, exp_avg_sq = lists
        return [*map(adamw.join, high, low), *exp_avg, *exp_avg_sq]

    steps = {OURS: ours, EAGER: plain, COMPILED: compiled(plain, device)}
    return {name: Run(reset_split, _stepped(step), compared) for name, step in steps.items()}


def _step_run(prepare: Callable[[], Any], step: Callable[[Any], None]) -> Run:
    return Run(prepare, _stepped(step), lambda lists: [*lists[0], *lists[2], *lists[3]])


def _stepped(step: Callable[[Any], None]) -> Callable[[Any], Any]:
    def run(lists: Any) -> Any:
        step(lists)
        return lists

    return run


def _draw(state: State) -> None:
    """The same random numbers every time. Gradients are bfloat16 numbers, and the second moment is
    not near zero, where a step would be any size.
    """
    device = state.parameters[0].device
    generator = torch.Generator(device).manual_seed(0)
    for p, g, m, v in zip(*state.lists, strict=True):
        p.normal_(0, 0.02, generator=generator)
        g.copy_(g.normal_(generator=generator).bfloat16())
        m.normal_(generator=generator)
        v.uniform_(0.5, 1.5, generator=generator)


def _exact(lists: Sequence[Sequence[Tensor]], coefficients: Tensor) -> list[Tensor]:
    """Parameters and moments after a step in float64, kept in float32."""
    found: tuple[list[Tensor], ...] = ([], [], [])
    for tensors in zip(*lists, strict=True):
        p, g, m, v = (x.double() for x in tensors)
        adamw.reference(p, g, m, v, coefficients, BETA1, BETA2, EPS)
        for kept, x in zip(found, (p, m, v), strict=True):
            kept.append(x.float())
    return [*found[0], *found[1], *found[2]]
