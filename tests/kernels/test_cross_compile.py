"""What the machine code of every kernel must be like, on GPUs that are not there."""

import pytest

from tests.kernels import variants, variants_optimizer
from tests.kernels.cross_compile import ARCHITECTURES, Code, compile_all

WHOLE_LINES = 128
SCALARS = 5
"""Loads and stores of single numbers, at most: a row's statistic, a label, a position."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_spills_no_float64_and_whole_lines():
    of_model = [v for arch in ARCHITECTURES for v in variants.variants(arch)]
    of_optimizer = [v for arch in ARCHITECTURES for v in variants_optimizer.variants(arch)]
    codes = compile_all([*of_model, *of_optimizer])
    assert not {name: code for name, code in codes.items() if not fine(code)}
    wide = {v.name: codes[v.name] for v in of_model}
    assert not {name: code for name, code in wide.items() if narrow(code) > SCALARS}


def fine(code: Code) -> bool:
    return code.spills == code.stack == code.float64 == 0 and WHOLE_LINES in code.loads


def narrow(code: Code) -> int:
    """Accesses to less than a whole line; an optimizer's tables and tails have them, too."""
    widths = [*code.loads.items(), *code.stores.items()]
    return sum(count for bits, count in widths if bits != WHOLE_LINES)
