"""`timeline.jsonl`: when each pipeline rank computed what, as a run measured it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megallama.config.errors import Problem, UserError
from megallama.config.suggest import either
from megallama.observe.jsonl import read_metrics
from megallama.observe.picture import HUES, Computation

FILE = "timeline.jsonl"
COUNTS = ("step", "attempt", "pipeline", "stage", "micro_batch")
TIMES = ("start_s", "stop_s")


def read_timeline(run: Path, step: int | None = None) -> tuple[int, list[list[Computation]]]:
    """One step of a run's timeline.

    A line of the file is `{"step", "attempt", "pipeline", "kind", "stage", "micro_batch",
    "start_s", "stop_s"}`: the start of the run that computed it, the pipeline rank, and seconds
    from the step's start. A run that went back to a checkpoint has steps of several attempts: the
    last one counts.

    Args:
        run: the run folder.
        step: which one; the last in the file by default.

    Returns:
        The step, and the computations of each pipeline rank.

    Raises:
        UserError: no such file or step, or a line that is none of these.

    """
    path = run / FILE
    try:
        lines = read_metrics(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    for number, line in enumerate(lines, 1):
        if (wrong := _wrong(line)) is not None:
            raise UserError([Problem("", wrong, f"{path}:{number}")])
    steps = [line["step"] for line in lines]
    if not steps:
        raise UserError([Problem("", "no step was written yet: train one", str(path))])
    step = steps[-1] if step is None else step
    if step not in steps:
        what = f"step {step} is not in {path}: use {either(sorted(set(steps)))}"
        raise UserError.one("--step", what)
    lines = [line for line in lines if line["step"] == step]
    lines = [line for line in lines if line["attempt"] == lines[-1]["attempt"]]
    ranks = range(1 + max(line["pipeline"] for line in lines))
    return step, [_row(lines, rank) for rank in ranks]


def _row(lines: list[dict[str, Any]], rank: int) -> list[Computation]:
    names = ("kind", "stage", "micro_batch", "start_s", "stop_s")
    return [Computation(*(line[n] for n in names)) for line in lines if line["pipeline"] == rank]


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        plan = path.with_name("config.yaml")
        what = f"the run measured no timeline; `megallama draw {plan}` draws the step as planned"
        return UserError([Problem("", what, str(path))])
    return UserError.one("", str(error))


def _wrong(line: dict[str, Any]) -> str | None:
    """What a line is not; None if it is a computation."""
    for name in COUNTS:
        if type(line.get(name)) is not int or line[name] < 0:
            return f"{name}: {line.get(name)!r} is no count from 0"
    for name in TIMES:
        value = line.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"{name}: {value!r} is no number of seconds"
    if line.get("kind") not in HUES:
        return f"kind: {line.get('kind')!r} is not {' or '.join(HUES)}"
    if line["stop_s"] < line["start_s"]:
        return f"stop_s: {line['stop_s']} is before start_s, {line['start_s']}"
    return None
