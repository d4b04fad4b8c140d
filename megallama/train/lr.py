"""Learning rate as a function of the step: nothing to save, nothing to restore."""

import math

from megallama.config.schema import LrScheduleConfig


def learning_rate(schedule: LrScheduleConfig, peak: float, steps: int, step: int) -> float:
    """The rate of one step.

    Linear warm-up reaches the peak at step `warmup_steps`; the decay reaches `min_lr` at the last
    step. Cosine: Loshchilov & Hutter 2017. WSD (warm-up, stable, decay): Hu et al. 2024.

    Args:
        schedule: shape of the curve.
        peak: the highest rate.
        steps: in the whole run.
        step: 0 for the first.

    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    start = schedule.warmup_steps
    if schedule.decay == "wsd":
        start = max(start, steps - (schedule.decay_steps or max(1, steps // 10)))
    span = steps - 1 - start
    progress = min(1.0, max(0, step - start) / span) if span > 0 else float(step >= start)
    remaining = (
        (1 + math.cos(math.pi * progress)) / 2 if schedule.decay == "cosine" else 1 - progress
    )
    return schedule.min_lr + (peak - schedule.min_lr) * remaining
