"""The console's columns, and how numbers are written in few characters of constant width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megallama.observe.record import EvalRecord, StepRecord

UNKNOWN = "-"
GAP = "  "


class Row(NamedTuple):
    """What a line is made of: a step and the time left after it."""

    record: StepRecord
    left_s: float | None


class Column(NamedTuple):
    """One column; on a narrow screen the highest `rank` goes first."""

    title: str
    width: int
    rank: int
    text: Callable[[Row], str]


COLUMNS: tuple[Column, ...] = (
    Column("step", 7, 0, lambda row: str(row.record.step)),
    Column("loss", 7, 1, lambda row: decimal(row.record.loss, 7, 4)),
    Column("bit/B", 5, 9, lambda row: decimal(row.record.bits_per_byte, 5, 3)),
    Column("norm", 7, 3, lambda row: decimal(row.record.grad_norm, 7, 3)),
    Column("lr", 8, 4, lambda row: f"{row.record.lr:.2e}"),
    Column("tok/s", 5, 2, lambda row: count(row.record.tokens_per_s)),
    Column("TF/s/dev", 8, 8, lambda row: decimal(row.record.tflops_per_device, 8, 2)),
    Column("MFU", 5, 5, lambda row: percent(row.record.mfu)),
    Column("GiB", 6, 7, lambda row: decimal(row.record.memory_gib, 6, 2)),
    Column("s/step", 6, 6, lambda row: decimal(row.record.step_time_s, 6, 3)),
    Column("data", 6, 10, lambda row: percent(row.record.data_wait_s / row.record.step_time_s)),
    Column("left", 6, 4, lambda row: duration(row.left_s)),
)


def fitting(width: int) -> tuple[Column, ...]:
    """The columns a line of `width` characters has room for, in their order."""
    chosen = list(COLUMNS)
    while len(chosen) > 1 and sum(c.width for c in chosen) + len(GAP) * (len(chosen) - 1) > width:
        chosen.remove(max(chosen, key=lambda column: column.rank))
    return tuple(chosen)


def header(columns: Sequence[Column]) -> str:
    """The titles, above their columns."""
    return GAP.join(column.title.rjust(column.width) for column in columns)


def line(columns: Sequence[Column], row: Row) -> str:
    """A step."""
    return GAP.join(column.text(row).rjust(column.width) for column in columns)


def evaluation_line(columns: Sequence[Column], record: EvalRecord) -> str:
    """An evaluation: its numbers below the same titles, then what they are."""
    values = {
        "step": str(record.step),
        "loss": decimal(record.loss, 7, 4),
        "bit/B": decimal(record.bits_per_byte, 5, 3),
    }
    shown = GAP.join(values[c.title].rjust(c.width) for c in columns if c.title in values)
    return f"{shown}{GAP}held-out, {count(record.tokens)} tokens in {duration(record.seconds)}"


def decimal(value: float | None, width: int, digits: int) -> str:
    """With up to `digits` decimals, fewer if they do not fit, then as a power of ten."""
    if value is None:
        return UNKNOWN
    for kept in range(digits, -1, -1):
        text = f"{value:.{kept}f}"
        if len(text) <= width:
            return text
    return f"{value:.0e}"


def count(value: float | None) -> str:
    """Three digits and a unit: 999, 12.3k, 8.03B."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return str(value)
    for unit in ("", "k", "M", "B", "T"):
        if abs(value) < 999.5 or unit == "T":
            break
        value /= 1000
    if not unit and value >= 100:
        return f"{value:.0f}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if not unit and "." in text else text) + unit


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal."""
    return UNKNOWN if value is None else f"{100 * value:.1f}%"


def duration(seconds: float | None) -> str:
    """Two units at most, six characters up to 999 days: 0.4s, 12s, 3m05s, 2h10m, 3d04h."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for size, unit, part, name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{name}"
    return f"{whole}s"
