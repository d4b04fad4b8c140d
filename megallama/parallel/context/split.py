"""Which tokens of a stream each context rank holds. Standard library only.

Every rank holds T / size tokens, whatever the documents are, so that messages keep their shape.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

Spans = list[range]
"""Ranges of the stream, ascending, none next to another."""


def contiguous(cu_seqlens: Sequence[int], size: int) -> list[Spans]:
    """Rank i holds the i-th part: for methods whose work does not depend on it."""
    part = cu_seqlens[-1] // size
    return [[range(rank * part, (rank + 1) * part)] for rank in range(size)]


def head_tail(cu_seqlens: Sequence[int], size: int) -> list[Spans]:
    """2·size chunks, rank i holds chunks i and 2·size - 1 - i (Llama 3, section 3.3.2).

    Causal work is the same on every rank if the stream is one document.
    """
    chunk = cu_seqlens[-1] // (2 * size)
    return [
        list(_merged(range(c * chunk, (c + 1) * chunk) for c in (rank, 2 * size - 1 - rank)))
        for rank in range(size)
    ]


def per_document(cu_seqlens: Sequence[int], size: int) -> list[Spans]:
    """Head and tail of every document, so that work is even where documents are long.

    What a document leaves over when it is cut into 2·size equal chunks (fewer tokens than chunks)
    goes to the ranks in runs; where documents are hardly longer than that, `head_tail` may be the
    more even one.
    """
    held: list[list[range]] = [[] for _ in range(size)]
    left_over: list[range] = []
    for start, stop in pairwise(cu_seqlens):
        chunk = (stop - start) // (2 * size)
        for c in range(2 * size if chunk else 0):
            rank = min(c, 2 * size - 1 - c)
            held[rank].append(range(start + c * chunk, start + (c + 1) * chunk))
        left_over.append(range(start + 2 * size * chunk, stop))
    for rank, ranges in enumerate(_dealt(left_over, size)):
        held[rank] += ranges
    return [list(_merged(sorted(ranges, key=lambda r: r.start))) for ranges in held]


SPLITS: dict[str, Callable[[Sequence[int], int], list[Spans]]] = {
    "contiguous": contiguous,
    "head_tail": head_tail,
    "per_document": per_document,
}


def stream_order(spans: Sequence[Spans]) -> list[int]:
    """For each token of the stream, its place when the ranks' tokens lie end to end."""
    order = [0] * sum(len(r) for ranges in spans for r in ranges)
    place = 0
    for ranges in spans:
        for r in ranges:
            order[r.start : r.stop] = range(place, place + len(r))
            place += len(r)
    return order


def _merged(ranges: Iterable[range]) -> Iterator[range]:
    last = range(0)
    for r in ranges:
        if r.start == last.stop and len(last):
            last = range(last.start, r.stop)
            continue
        if len(last):
            yield last
        last = r
    if len(last):
        yield last


def _dealt(ranges: Sequence[range], size: int) -> list[list[range]]:
    """Cut ranges into `size` equal shares, in order."""
    share = sum(map(len, ranges)) // size
    shares: list[list[range]] = [[] for _ in range(size)]
    rank, room = 0, share
    for r in ranges:
        while len(r):
            taken, r = r[:room], r[room:]
            shares[rank].append(taken)
            room -= len(taken)
            if room == 0:
                rank, room = rank + 1, share
    return shares
