"""The closed form of communication is what verify counts, call for call and byte for byte."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megallama.config.schema import Config
from megallama.parallel.volume import step_volume
from megallama.verify.compare import Report
from megallama.verify.run import verify
from megallama.verify.shrink import shrink
from tests.verify.layouts import LAYOUTS, make_config

PROCESSES = 16
IN_EVERY_RUN = {"TP2 PP2", "CP2", "FSDP2"}
IN_OTHER_DTYPES = [
    "TP2",
    "CP2",
    "CP2 ring",
    "CP2 Ulysses",
    "FSDP2 without resharding",
    "tied, TP2 PP2 FSDP2",
    "TP2 CP2 PP2 FSDP2",
    "selective recomputation, TP2 PP2 FSDP2",
]

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


def check(name: str, dtype: str) -> None:
    config = make_config(**LAYOUTS[name])
    report = verify(config, dtype=dtype, steps=2, max_processes=PROCESSES)
    twin = shrink(config, dtype=dtype, steps=2, max_processes=PROCESSES)
    found = counted(report)
    assert found == in_closed_form(twin, {label for label, _ in found})


def cases() -> list[Any]:
    slow = (pytest.mark.slow,)
    return [pytest.param(n, marks=() if n in IN_EVERY_RUN else slow) for n in LAYOUTS]


@pytest.mark.parametrize("name", cases())
def test_is_what_verify_counts(name: str):
    check(name, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("name", IN_OTHER_DTYPES)
def test_is_what_verify_counts_in_other_dtypes(name: str, dtype: str):
    check(name, dtype)
