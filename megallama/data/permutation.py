"""A random order of any length that is computed per index and never stored."""

from __future__ import annotations

ROUNDS = 4
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def derive_key(*parts: int) -> int:
    """Hash integers of any size into a 64-bit key; their order counts."""
    key = 0
    for part in parts:
        while True:
            key = _mix(key + _GOLDEN + (part & _MASK64))
            part >>= 64
            if part in (0, -1):
                break
    return key


def permute(i: int, n: int, key: int) -> int:
    """Where `i` goes in the permutation of range(n) that `key` names; 0 <= i < n <= 2**128.

    A balanced Feistel network permutes the smallest 4**k >= n. Results >= n are sent through again
    (cycle walking), which keeps it a bijection on range(n).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mix(right + key + turn * _GOLDEN) & mask)
        i = left << half | right
        if i < n:
            return i


def _mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014)."""
    x &= _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)
