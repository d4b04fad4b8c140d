"""What the machine code of every kernel must be like, on GPUs that are not there."""

import pytest

from tests.kernels.cross_compile import ARCHITECTURES, compile_all
from tests.kernels.variants import variants

WHOLE_LINES = 128
SCALARS = 5
"""Loads and stores of single numbers, at most: a row's statistic, a label, a position."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_spills_no_float64_and_whole_lines():
    wrong = {}
    for name, code in compile_all([v for a in ARCHITECTURES for v in variants(a)]).items():
        widths = [*code.loads.items(), *code.stores.items()]
        narrow = sum(count for bits, count in widths if bits != WHOLE_LINES)
        fine = code.spills == code.stack == code.float64 == 0
        if not fine or narrow > SCALARS or WHOLE_LINES not in code.loads:
            wrong[name] = code
    assert not wrong
