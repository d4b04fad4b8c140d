"""The closed form of communication is what verify counts, call for call and byte for byte.

tests/verify/test_layouts.py holds every layout to it in float64.
"""

from __future__ import annotations

import pytest

from megallama.verify.run import verify
from megallama.verify.shrink import shrink
from tests.verify.layouts import LAYOUTS, make_config
from tests.verify.volumes import counted, in_closed_form

PROCESSES = 16
IN_EVERY_RUN = ["FSDP2"]
IN_OTHER_DTYPES = [
    "TP2 FSDP2",
    "CP2",
    "CP2 ring",
    "CP2 Ulysses",
    "FSDP2 without resharding",
    "tied, TP2 PP2 FSDP2",
    "TP2 CP2 PP2 FSDP2",
    "selective recomputation, TP2 PP2 FSDP2",
]


def check(name: str, dtype: str) -> None:
    config = make_config(**LAYOUTS[name])
    report = verify(config, dtype=dtype, steps=2, max_processes=PROCESSES)
    twin = shrink(config, dtype=dtype, steps=2, max_processes=PROCESSES)
    found = counted(report)
    assert found == in_closed_form(twin, {label for label, _ in found})


@pytest.mark.parametrize("name", IN_EVERY_RUN)
def test_is_what_verify_counts(name: str):
    check(name, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("name", IN_OTHER_DTYPES)
def test_is_what_verify_counts_in_other_dtypes(name: str, dtype: str):
    check(name, dtype)
