from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.permutation import derive_key, permute

keys = st.integers(0, 2**64 - 1)


@given(n=st.integers(1, 3000), key=keys)
@settings(deadline=None)
def test_is_a_bijection(n: int, key: int):
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


@given(n=st.integers(1, 2**100), key=keys, data=st.data())
@settings(deadline=None)
def test_stays_in_range_and_apart_at_any_size(n: int, key: int, data: st.DataObject):
    several = data.draw(st.sets(st.integers(0, n - 1), max_size=20))
    images = {permute(i, n, key) for i in several}
    assert len(images) == len(several)
    assert all(0 <= image < n for image in images)


@given(
    parts=st.lists(st.integers(0, 2**200), min_size=1, max_size=4),
    at=st.integers(0, 3),
    bit=st.integers(0, 199),
)
def test_every_bit_of_every_part_changes_the_key(parts: list[int], at: int, bit: int):
    other = list(parts)
    other[at % len(parts)] ^= 1 << bit
    key = derive_key(*parts)
    assert 0 <= key < 2**64
    assert derive_key(*other) != key


def test_order_of_parts_counts():
    assert derive_key(1, 2) != derive_key(2, 1)


def test_looks_random():
    """Fixed points of a random permutation are Poisson(1), neighbours rarely stay neighbours."""
    n = 10_000
    orders = [[permute(i, n, derive_key(key)) for i in range(n)] for key in range(3)]
    for order in orders:
        assert sum(i == j for i, j in enumerate(order)) <= 8
        assert sum(abs(a - b) == 1 for a, b in pairwise(order)) <= 15
    assert sum(a == b for a, b in zip(*orders[:2], strict=True)) <= 8
