"""Tokens to context ranks: nothing lost, and how even the work is."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import gcd

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megallama.parallel.context.split import (
    SPLITS,
    Spans,
    contiguous,
    head_tail,
    per_document,
    stream_order,
)
from tests.model.small import borders_of

every_split = pytest.mark.parametrize("name", SPLITS)
sizes = st.integers(1, 5)


@st.composite
def streams(draw: st.DrawFn, shortest: int = 1) -> tuple[list[int], int]:
    """Lengths of documents and a number of ranks; 2 x ranks divides the sum of the lengths."""
    size = draw(sizes)
    lengths = draw(
        st.lists(
            st.integers(shortest, shortest + 8) | st.integers(shortest, shortest + 40),
            min_size=1,
            max_size=8,
        )
    )
    lengths[draw(st.integers(0, len(lengths) - 1))] += -sum(lengths) % (2 * size)
    return lengths, size


def tokens_of(spans: Spans) -> list[int]:
    return [token for r in spans for token in r]


def pairs_of(spans: Spans, lengths: Sequence[int]) -> int:
    """Queries of these spans and the keys they see, counted one by one."""
    document = [d for d, length in enumerate(lengths) for _ in range(length)]
    return sum(document[key] == document[q] for q in tokens_of(spans) for key in range(q + 1))


def work(name: str, lengths: Sequence[int], size: int) -> list[int]:
    """Attended pairs of each rank."""
    return [pairs_of(spans, lengths) for spans in SPLITS[name](borders_of([*lengths]), size)]


def imbalance(name: str, lengths: Sequence[int], size: int) -> Fraction:
    """Attended pairs of the rank that has most, over the mean of all ranks."""
    pairs = work(name, lengths, size)
    return Fraction(max(pairs) * size, sum(pairs))


@every_split
@given(stream=streams())
def test_every_token_is_on_one_rank_and_every_rank_has_equally_many(
    name: str, stream: tuple[list[int], int]
):
    lengths, size = stream
    ranks = SPLITS[name](borders_of(lengths), size)
    held = [tokens_of(spans) for spans in ranks]
    assert [len(tokens) for tokens in held] == [sum(lengths) // size] * size
    assert sorted(token for tokens in held for token in tokens) == list(range(sum(lengths)))


@every_split
@given(stream=streams())
def test_spans_ascend_and_touch_only_if_they_are_one(name: str, stream: tuple[list[int], int]):
    lengths, size = stream
    for spans in SPLITS[name](borders_of(lengths), size):
        assert all(len(r) > 0 and r.step == 1 for r in spans)
        assert all(one.stop < other.start for one, other in pairwise(spans))


@every_split
@given(stream=streams())
def test_stream_order_is_the_inverse_of_laying_the_ranks_end_to_end(
    name: str, stream: tuple[list[int], int]
):
    lengths, size = stream
    ranks = SPLITS[name](borders_of(lengths), size)
    laid = [token for spans in ranks for token in tokens_of(spans)]
    order = stream_order(ranks)
    assert [laid[place] for place in order] == list(range(sum(lengths)))
    assert [order[token] for token in laid] == list(range(sum(lengths)))


@given(stream=streams())
def test_contiguous_is_one_span_a_rank(stream: tuple[list[int], int]):
    lengths, size = stream
    part = sum(lengths) // size
    expected = [[range(rank * part, rank * part + part)] for rank in range(size)]
    assert contiguous(borders_of(lengths), size) == expected


@given(stream=streams())
def test_head_tail_takes_a_chunk_from_each_end(stream: tuple[list[int], int]):
    lengths, size = stream
    chunk = sum(lengths) // (2 * size)
    stream_tokens = list(range(sum(lengths)))
    for rank, spans in enumerate(head_tail(borders_of(lengths), size)):
        before_tail = len(stream_tokens) - (rank + 1) * chunk
        head = stream_tokens[rank * chunk :][:chunk]
        assert tokens_of(spans) == head + stream_tokens[before_tail:][:chunk]


@given(rows=st.integers(1, 5), multiple=st.integers(1, 8), size=sizes)
def test_head_tail_of_one_document_or_of_equal_rows_is_exactly_even(
    rows: int, multiple: int, size: int
):
    """A token that sees p keys and its mirror image in the stream see length + 1 together."""
    length = multiple * 2 * size // gcd(rows, 2 * size)
    chunk = rows * length // (2 * size)
    assert work("head_tail", [length] * rows, size) == [chunk * (length + 1)] * size


@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4), size=sizes)
def test_per_document_is_exactly_even_where_chunks_fit(chunks: list[int], size: int):
    lengths = [2 * size * chunk for chunk in chunks]
    expected = sum(c * (n + 1) for c, n in zip(chunks, lengths, strict=True))
    assert work("per_document", lengths, size) == [expected] * size


@given(stream=streams())
def test_per_document_takes_head_and_tail_of_each_document(stream: tuple[list[int], int]):
    """And as many of the tokens that are left over as any other rank."""
    lengths, size = stream
    borders = borders_of(lengths)
    for rank, spans in enumerate(per_document(borders, size)):
        chunks: set[int] = set()
        for start, length in zip(borders, lengths, strict=False):
            c = length // (2 * size)
            tail = start + (2 * size - 1 - rank) * c
            chunks |= {*range(start + rank * c, start + (rank + 1) * c), *range(tail, tail + c)}
        left_over = sum(length % (2 * size) for length in lengths) // size
        assert chunks <= {*tokens_of(spans)}
        assert len(tokens_of(spans)) == len(chunks) + left_over


def worst(size: int) -> tuple[int, int, Fraction]:
    """The most uneven that `per_document` can be.

    What is not even are the tokens left over: 0 … 2n-1 at the end of a document of 2nc + r, and
    each rank gets an n-th of all of them. Worst, one rank has those of documents with n-1 times
    as many left-over tokens elsewhere that cost as little as can be: documents of one token. Of
    all c and r, c = 1 and r = 2n-1 then weigh most, as `test_no_other_length_is_worse` finds.

    Returns:
        Length of these documents, how many of one token there are for each, and the imbalance.

    """
    n = size
    return (
        4 * n - 1,
        (n - 1) * (2 * n - 1),
        Fraction(n * (6 * n * n - n + 1), 10 * n * n - 5 * n + 1),
    )


def test_the_worst_in_numbers():
    found = [round(float(worst(size)[2]), 2) for size in (1, 2, 4, 8)]
    assert found == [1.0, 1.48, 2.64, 5.02]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_no_other_length_is_worse(size: int):
    """The imbalance is a mean of these quotients, one for each document, weighed by its pairs."""
    found = set()
    for chunk in range(4 * size):
        base = chunk * (2 * size * chunk + 1)
        for left_over in range(1, 2 * size):
            length = 2 * size * chunk + left_over
            for held in range(1, left_over + 1):  # the last of them: they have most pairs
                others = (size - 1) * held - (left_over - held)
                mine = base + sum(range(length - held + 1, length + 1))
                found.add(Fraction(size * mine, length * (length + 1) // 2 + others))
    assert max(found) == worst(size)[2]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_per_document_at_its_worst(size: int):
    length, ones, expected = worst(size)
    lengths = [length] * 2 * size + [1] * (2 * size * ones)
    assert imbalance("per_document", lengths, size) == expected


@given(stream=streams())
@example(stream=([7, 7, 1, 1, 1, 1, 1, 1], 2))
@example(stream=([1, 1, 1, 1, 1, 1, 7, 7], 2))
@example(stream=([1, 3], 2))
def test_per_document_is_never_worse_than_that(stream: tuple[list[int], int]):
    lengths, size = stream
    assert imbalance("per_document", lengths, size) <= worst(size)[2]


@pytest.mark.parametrize("shortest", [20, 60])
@given(data=st.data())
def test_per_document_is_even_where_documents_are_long(shortest: int, data: st.DataObject):
    """At most 2n-1 tokens of a document are left over, each sees at most all of it."""
    lengths, size = data.draw(streams(shortest))
    most = 2 * size * (2 * size - 1)
    assert imbalance("per_document", lengths, size) <= 1 + Fraction(most, min(lengths) + 1)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_head_tail_gives_one_rank_a_document_in_the_middle_and_per_document_does_not(size: int):
    chunk = 16
    lengths = [1] * (size - 1) * chunk + [2 * chunk] + [1] * (size - 1) * chunk
    heaviest = chunk * (2 * chunk + 1)
    assert work("head_tail", lengths, size) == [2 * chunk] * (size - 1) + [heaviest]
    assert (
        work("per_document", lengths, size)
        == [heaviest // size + 2 * chunk // size * (size - 1)] * size
    )


def test_per_document_can_be_less_even_than_head_tail():
    """Where documents have hardly more tokens than there are chunks."""
    lengths = [7, 7, 1, 1, 1, 1, 1, 1]
    assert imbalance("head_tail", lengths, 2) < imbalance("per_document", lengths, 2)
