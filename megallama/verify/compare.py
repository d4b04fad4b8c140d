"""Holds what the ranks saw against the reference, and says whether it is within the bar.

The bars (relative errors):

| dtype   | bar |
|---------|-----|
| float64 | loss and grad norm of every step, gradients and final weights within 1e-9 |
| float32 | loss, grad norm and gradients of step 1 within 1e-5; |
|         | loss and grad norm of all steps within 3x the drift |
| bf16    | gradients of step 1 within 1.5x the drift; |
|         | loss and grad norm of all steps within 3x the drift |

The drift at a step is how far, up to two steps later, one-process runs in the same dtype, which
differ only in the number of micro-batches, get from the one-process run in float64; the layout is
held against that run too. Two steps later, because rounding grows from step to step and takes off
earlier in one run than in another. The gradients' drift is that of the worst parameter.
Runs in one process share most of their roundings, so their distance from each other says too
little: a layout that is nearer to float64 than all of them would fail by it.

Initial weights are equal to the bit, always.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXACT_BAR = 1e-9
FIRST_STEP_BAR = 1e-5
BF16_GRADIENT_FACTOR = 1.5
"""Tensor ranks round their partial sums before these are added."""
DRIFT_FACTOR = 3.0
LOOK_AHEAD = 2
SETTLED = 5
"""Steps whose drifts count from the start: a single one may be small by chance."""
DRIFT_FLOOR = 2 * 2.0**-23
"""Two roundings of float32: drift below it is no evidence of anything."""


@dataclass(frozen=True)
class Check:
    """One comparison and its bar."""

    name: str
    error: float
    bar: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.bar


@dataclass(frozen=True)
class StepComparison:
    """Loss and grad norm of one step."""

    step: int
    """1 for the first."""
    loss: float
    reference_loss: float
    grad_norm: float
    reference_grad_norm: float


@dataclass(frozen=True)
class Communication:
    """Calls of one kind on one axis in one step; of the rank that has most."""

    axis: str
    kind: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """What `megallama verify` found."""

    layout: str
    model: str
    dtype: str
    processes: int
    checks: list[Check]
    steps: list[StepComparison]
    gradient_errors: dict[str, float]
    """Relative error of each parameter's gradient in the first step."""
    communication: list[Communication]

    @property
    def passed(self) -> bool:
        """Every check did."""
        return all(check.passed for check in self.checks)


def compare(
    ranks: Sequence[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    exact: dict[str, Any],
    dtype: str,
) -> dict[str, Any]:
    """Fields of a `Report`.

    Args:
        ranks: what each rank saw.
        references: one-process runs; the first took whole batches, the others more micro-batches.
        exact: the one-process run in float64.
        dtype: `float64`, `float32` or `bf16`.

    """
    reference = references[0]
    gradients = region_errors((rank["gradient"] for rank in ranks), reference["gradient"])
    initial = region_errors((rank["initial"] for rank in ranks), reference["initial"])
    final = region_errors((rank["final"] for rank in ranks), reference["final"])
    errors = _worst_curve([_curve_errors(rank, reference) for rank in ranks])
    checks = [Check("initial weights", max(initial.values()), 0.0)]
    worst_gradient = max(gradients.values())
    if dtype == "float64":
        checks += [
            Check("loss", max(errors["loss"]), EXACT_BAR),
            Check("grad norm", max(errors["grad_norm"]), EXACT_BAR),
            Check("gradients, step 1", worst_gradient, EXACT_BAR),
            Check("final weights", max(final.values()), EXACT_BAR),
        ]
    else:
        from_exact = _worst_curve([_curve_errors(rank, exact) for rank in ranks])
        drift = _worst_curve([_curve_errors(run, exact) for run in references])
        for what in ("loss", "grad_norm"):
            name = what.replace("_", " ")
            error, bar = _tightest(from_exact[what], drift[what])
            if dtype == "float32":
                checks.append(Check(f"{name}, step 1", errors[what][0], FIRST_STEP_BAR))
            checks.append(Check(f"{name}, all steps", error, bar))
        if dtype == "float32":
            checks.append(Check("gradients, step 1", worst_gradient, FIRST_STEP_BAR))
        else:
            gradients_from_exact = region_errors((r["gradient"] for r in ranks), exact["gradient"])
            drift_of_gradients = max(_gradient_error(run, exact) for run in references)
            bar = BF16_GRADIENT_FACTOR * drift_of_gradients
            checks.append(Check("gradients, step 1", max(gradients_from_exact.values()), bar))
    return {
        "checks": checks,
        "steps": _steps(ranks[0], reference),
        "gradient_errors": gradients,
        "communication": _communication(ranks),
    }


def region_errors(
    ranks: Iterable[list[tuple[str, tuple[int, ...], Tensor]]], reference: dict[str, Tensor]
) -> dict[str, float]:
    """Relative error of each parameter over all the regions that ranks hold.

    Every copy counts, so that copies that differ show. Infinite where an element is held by no
    rank.
    """
    squares = {name: [0.0, 0.0] for name in reference}
    held = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in reference.items()}
    for regions in ranks:
        for name, offsets, tensor in regions:
            place = tuple(
                slice(start, start + size)
                for start, size in zip(offsets, tensor.shape, strict=True)
            )
            expected = reference[name][place].double()
            held[name][place] = True
            squares[name][0] += (tensor.double() - expected).square().sum().item()
            squares[name][1] += expected.square().sum().item()
    return {
        name: _relative(math.sqrt(wrong), math.sqrt(whole)) if held[name].all() else math.inf
        for name, (wrong, whole) in squares.items()
    }


def _gradient_error(found: dict[str, Any], exact: dict[str, Any]) -> float:
    """Of the worst parameter, over all of it."""
    return max(
        _relative((mine.double() - true).norm().item(), true.norm().item())
        for mine, true in zip(found["gradient"].values(), exact["gradient"].values(), strict=True)
    )


def _curve_errors(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, list[float]]:
    return {
        what: [
            _relative(abs(a - b), abs(b)) for a, b in zip(found[what], reference[what], strict=True)
        ]
        for what in ("loss", "grad_norm")
    }


def _worst_curve(curves: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {
        what: [max(values) for values in zip(*(curve[what] for curve in curves), strict=True)]
        for what in ("loss", "grad_norm")
    }


def _tightest(errors: Sequence[float], drifts: Sequence[float]) -> tuple[float, float]:
    """The error that is nearest to its step's bar, or farthest above it, and that bar."""
    bars = [
        DRIFT_FACTOR * max(DRIFT_FLOOR, *drifts[: max(step + 1 + LOOK_AHEAD, SETTLED)])
        for step in range(len(drifts))
    ]
    return max(zip(errors, bars, strict=True), key=lambda pair: pair[0] / pair[1])


def _relative(difference: float, size: float) -> float:
    if math.isnan(difference) or math.isnan(size):
        return math.inf
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def _steps(found: dict[str, Any], reference: dict[str, Any]) -> list[StepComparison]:
    columns = (found["loss"], reference["loss"], found["grad_norm"], reference["grad_norm"])
    return [StepComparison(n + 1, *row) for n, row in enumerate(zip(*columns, strict=True))]


def _communication(ranks: Sequence[dict[str, Any]]) -> list[Communication]:
    keys = sorted({key for rank in ranks for key in rank["calls"]})
    return [
        Communication(
            axis,
            kind,
            max(rank["calls"].get((axis, kind), 0) for rank in ranks),
            max(rank["bytes"].get((axis, kind), 0) for rank in ranks),
        )
        for axis, kind in keys
    ]
