"""What to use instead: near words, near numbers, and how to list them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest(word: str, words: Sequence[str], most: int = 1) -> list[str]:
    """The words spelled most like `word`, best first; case does not count."""
    lower = {each.lower(): each for each in words}
    found = difflib.get_close_matches(word.lower()[:100], list(lower), most, 0.6)
    return [lower[each] for each in found]


def either(choices: Sequence[object]) -> str:
    """`[1, 2, 4]` -> `1, 2 or 4`."""
    *rest, last = map(str, choices)
    return f"{', '.join(rest)} or {last}" if rest else last


def near_multiples(value: int, unit: int) -> list[int]:
    """The multiples of `unit` just below and above `value`, none of them 0."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def near_divisors(value: int, wanted: int) -> list[int]:
    """Up to four divisors of `value`, those nearest to `wanted`; small ones and `value` itself."""
    divisors = [n for n in (*range(1, min(value, 1025)), value) if value % n == 0]
    return sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:4])
