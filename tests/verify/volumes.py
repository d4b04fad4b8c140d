"""The closed form of communication beside what verify counted."""

from __future__ import annotations

from collections import Counter

from megallama.config.schema import Config
from megallama.parallel.volume import step_volume
from megallama.verify.compare import Report

Row = tuple[str, str]
"""What a report calls the axis, and the kind."""


def counted(report: Report) -> dict[Row, tuple[int, int]]:
    """Calls and bytes."""
    return {(row.axis, row.kind): (row.calls, row.bytes) for row in report.communication}


def in_closed_form(config: Config, labels: set[str]) -> dict[Row, tuple[int, int]]:
    """Of the rank that has most of each; axes that share a process group are in one row."""
    label_of = {axis: label for label in labels for axis in label.split(", ")}
    calls: Counter[Row] = Counter()
    moved: Counter[Row] = Counter()
    for rank in range(config.layout.pipeline):
        mine: dict[str, Counter[Row]] = {"calls": Counter(), "bytes": Counter()}
        for volume in step_volume(config, rank):
            row = label_of.get(volume.axis, volume.axis), volume.kind
            mine["calls"][row] += volume.calls
            mine["bytes"][row] += volume.bytes
        calls |= mine["calls"]
        moved |= mine["bytes"]
    return {row: (calls[row], moved[row]) for row in calls}
