"""Every layout gives the numbers of one process, by the bars of `verify/compare.py`."""

from __future__ import annotations

from typing import Any

import pytest

from megallama.verify.compare import Report
from megallama.verify.run import verify
from megallama.verify.shrink import shrink
from tests.verify.layouts import LAYOUTS, STEPS, make_config
from tests.verify.volumes import counted, in_closed_form

IN_EVERY_RUN = {
    "TP2 PP2",
    "HSDP 2x2",
    "kv_heads 2, TP4",
    "CP2",
    "CP2 ring",
    "interleaved V=2, PP2",
}


SPLIT = [name for name in LAYOUTS if name.startswith("split masters")]


def cases(in_every_run: set[str]) -> list[Any]:
    return [
        pytest.param(name, id=name, marks=() if name in in_every_run else (pytest.mark.slow,))
        for name in LAYOUTS
    ]


def assert_same_numbers(config: Any, dtype: str) -> Report:
    report = verify(config, dtype=dtype, steps=STEPS, max_processes=16)
    assert len(report.steps) == STEPS
    assert report.passed, [check for check in report.checks if not check.passed]
    return report


@pytest.mark.parametrize("name", cases(IN_EVERY_RUN))
def test_float64_and_what_is_moved(name):
    config = make_config(**LAYOUTS[name])
    found = counted(assert_same_numbers(config, "float64"))
    twin = shrink(config, dtype="float64", steps=STEPS, max_processes=16)
    assert found == in_closed_form(twin, {label for label, _ in found})


@pytest.mark.parametrize("name", cases({"TP2 PP2"}))
def test_float32(name):
    assert_same_numbers(make_config(**LAYOUTS[name]), "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["TP2", "PP2", "FSDP2", "TP2 PP2 FSDP2", "HSDP 2x2", "CP2", *SPLIT]
)
def test_bf16(name):
    assert_same_numbers(make_config(**LAYOUTS[name]), "bf16")
