"""The learning rate's curve, by formula, by property and at exact points."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megallama.config.schema import LrScheduleConfig
from megallama.train.lr import learning_rate
from tests.config.sample import load

PEAK, LOWEST = 1e-3, 1e-5

decays = st.sampled_from(["cosine", "linear", "wsd", "constant"])
# steps, and a warm-up that leaves a decay of two steps or more
runs = st.integers(3, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 2)))


def curve(steps: int, **changes: Any) -> list[float]:
    schedule = LrScheduleConfig(**({"min_lr": LOWEST} | changes))
    return [learning_rate(schedule, PEAK, steps, step) for step in range(steps)]


@given(run=runs, decay=decays)
def test_warm_up_is_a_straight_line_to_the_peak(run: tuple[int, int], decay: str):
    steps, warmup = run
    rates = curve(steps, warmup_steps=warmup, decay=decay)
    for k in range(warmup):
        assert rates[k] == pytest.approx(PEAK * (k + 1) / warmup)
    assert rates[warmup] == pytest.approx(PEAK)
    assert max(rates) == pytest.approx(PEAK)
    assert min(rates) > 0


@given(run=runs, decay=st.sampled_from(["cosine", "linear"]))
def test_decay_is_the_formula(run: tuple[int, int], decay: str):
    """Between the peak, at the first step after the warm-up, and the lowest, at the last step."""
    steps, warmup = run
    rates = curve(steps, warmup_steps=warmup, decay=decay)
    last = steps - 1
    for step in range(warmup, steps):
        fraction = (step - warmup) / (last - warmup)
        linear = PEAK - (PEAK - LOWEST) * fraction
        cosine = (PEAK + LOWEST) / 2 + (PEAK - LOWEST) / 2 * math.cos(math.pi * fraction)
        assert rates[step] == pytest.approx(linear if decay == "linear" else cosine, rel=1e-9)


@given(run=runs, decay_steps=st.integers(2, 400))
def test_wsd_stays_at_the_peak_and_falls_linearly_at_the_end(
    run: tuple[int, int], decay_steps: int
):
    steps, warmup = run
    decay_steps = min(decay_steps, steps - warmup)
    rates = curve(steps, warmup_steps=warmup, decay="wsd", decay_steps=decay_steps)
    start = steps - decay_steps
    assert rates[warmup : start + 1] == pytest.approx([PEAK] * (start + 1 - warmup))
    falls = [a - b for a, b in pairwise(rates[start:])]
    assert falls == pytest.approx([(PEAK - LOWEST) / (decay_steps - 1)] * (decay_steps - 1))
    assert rates[-1] == pytest.approx(LOWEST)


@given(run=runs, decay=decays, min_lr=st.floats(0, PEAK))
def test_it_never_rises_after_the_warm_up_and_ends_at_the_lowest(
    run: tuple[int, int], decay: str, min_lr: float
):
    steps, warmup = run
    assume(decay != "wsd" or (steps > 10 and warmup + steps // 10 < steps))
    rates = curve(steps, warmup_steps=warmup, decay=decay, min_lr=min_lr)
    after = rates[warmup:]
    assert all(a >= b - 1e-15 for a, b in pairwise(after))
    assert rates[-1] == pytest.approx(PEAK if decay == "constant" else min_lr, abs=1e-15)


@given(steps=st.integers(1, 300), warmup=st.integers(0, 300), decay=decays)
def test_any_run_has_finite_rates_between_zero_and_the_peak(steps: int, warmup: int, decay: str):
    rates = curve(steps, warmup_steps=min(warmup, steps), decay=decay)
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in rates)


def test_llama_3_405b():
    """arXiv 2407.21783: 8,000 steps to 8e-5, a cosine to 8e-7 at step 1,200,000."""
    schedule = LrScheduleConfig(warmup_steps=8000, decay="cosine", min_lr=8e-7)

    def rate(step: int) -> float:
        return learning_rate(schedule, 8e-5, 1_200_000, step)

    assert rate(0) == pytest.approx(1e-8)
    assert rate(3999) == pytest.approx(4e-5)
    assert rate(7999) == rate(8000) == pytest.approx(8e-5)
    middle = (8000 + 1_199_999) / 2
    assert (rate(math.floor(middle)) + rate(math.ceil(middle))) / 2 == pytest.approx(4.04e-5)
    assert rate(1_199_999) == pytest.approx(8e-7)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [5, 10, 10, 8, 6, 4, 2]),
        ("constant", [5, 10, 10, 10, 10, 10, 10]),
        ("cosine", [5, 10, 10, 2 + 4 + 4 * math.sqrt(0.5), 6, 2 + 4 - 4 * math.sqrt(0.5), 2]),
    ],
)
def test_seven_steps(decay: str, expected: list[float]):
    schedule = LrScheduleConfig(warmup_steps=2, decay=decay, min_lr=2)
    rates = [learning_rate(schedule, 10.0, 7, step) for step in range(7)]
    assert rates == pytest.approx(expected)


def test_seven_steps_of_wsd():
    schedule = LrScheduleConfig(warmup_steps=2, decay="wsd", decay_steps=3, min_lr=2)
    rates = [learning_rate(schedule, 10.0, 7, step) for step in range(7)]
    assert rates == pytest.approx([5, 10, 10, 10, 10, 6, 2])


def decay_that_the_rules_assume(steps: int) -> int:
    """The longest decay that fits: with one more step of warm-up, the rules refuse the run."""
    for warmup in range(steps, -1, -1):
        settings = (f"train.steps={steps}", f"lr_schedule.warmup_steps={warmup}")
        try:
            load(*settings, "lr_schedule.decay=wsd")
        except Exception:
            continue
        return steps - warmup
    raise AssertionError("no warm-up fits")


@pytest.mark.parametrize(
    "steps",
    [
        20,
        100,
        25,
    ],
)
def test_the_default_decay_is_as_long_as_the_rules_assume(steps: int):
    rates = curve(steps, decay="wsd")
    first_below = next(step for step, rate in enumerate(rates) if rate < PEAK * 0.999)
    assert steps - (first_below - 1) == decay_that_the_rules_assume(steps)


@pytest.mark.parametrize(
    "changes",
    [
        {"decay": "wsd", "decay_steps": 1},
        {"decay": "wsd"},
        {"decay": "cosine", "warmup_steps": 9},
        {"decay": "linear", "warmup_steps": 9},
    ],
    ids=str,
)
def test_a_decay_of_one_step_reaches_the_lowest(changes: dict[str, Any]):
    """As the schema says: `min_lr` is the learning rate at the last step."""
    assert curve(10, **changes)[-1] == pytest.approx(LOWEST)
