from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.sampler import BLOCK, IGNORED, MixedSamples, count_windows, cut_sample, quotas
from megallama.data.shards import Split

lengths_of_documents = st.lists(st.integers(1, 12), min_size=1, max_size=40)
weight_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def stream_of(lengths: list[int], first_token: int = 0) -> Split:
    """Documents of these lengths; token first_token + n says where it stands."""
    ends = np.cumsum(lengths).astype(np.uint64)
    tokens = np.arange(first_token, first_token + int(ends[-1])).astype(np.uint32)
    return Split(tokens, ends, text_bytes=0, digest="")


def mix(*splits: Split, weights: list[float] | None = None, seq_len: int = 4, **options: Any):
    options = {"document_mask": True, "seed": 1} | options
    return MixedSamples(splits, weights or [1.0] * len(splits), seq_len=seq_len, **options)


def naive_windows(lengths: list[int], seq_len: int, document_mask: bool) -> list[tuple]:
    """Every (tokens, labels, cu_seqlens) there is, by a walk over the documents."""
    stream = [(document, n) for document, length in enumerate(lengths) for n in range(length)]
    windows = []
    start = 0
    while start + seq_len < len(stream):
        row = stream[start : start + seq_len]
        following = stream[start + 1 : start + seq_len + 1]
        labels, borders = [], [0]
        for t, ((document, _), (next_document, _)) in enumerate(zip(row, following, strict=True)):
            crosses = document_mask and next_document != document
            labels.append(-100 if crosses else start + t + 1)
            if crosses and t + 1 < seq_len:
                borders.append(t + 1)
        windows.append((list(range(start, start + seq_len)), labels, [*borders, seq_len]))
        start += seq_len
    return windows


@given(
    lengths=lengths_of_documents,
    seq_len=st.integers(1, 20),
    document_mask=st.booleans(),
    epoch=st.integers(0, 2**70),
    seed=st.integers(0, 2**70),
)
@settings(deadline=None)
def test_an_epoch_is_every_window_once(
    lengths: list[int], seq_len: int, document_mask: bool, epoch: int, seed: int
):
    windows = naive_windows(lengths, seq_len, document_mask)
    assert count_windows(sum(lengths), seq_len) == len(windows)
    if not windows:
        return
    samples = mix(stream_of(lengths), seq_len=seq_len, document_mask=document_mask, seed=seed)
    first = epoch * len(windows)
    read = [samples[i] for i in range(first, first + len(windows))]
    as_lists = [(s.tokens.tolist(), s.labels.tolist(), s.cu_seqlens.tolist()) for s in read]
    assert sorted(as_lists) == windows


def test_types():
    sample = mix(stream_of([3, 9]))[0]
    assert [sample.tokens.dtype, sample.labels.dtype, sample.cu_seqlens.dtype] == [
        np.int64,
        np.int64,
        np.int32,
    ]


def test_last_label_of_a_row_that_ends_with_a_document():
    sample = cut_sample(stream_of([4, 4]), 0, 4, document_mask=True)
    assert sample.labels.tolist() == [1, 2, 3, IGNORED]
    assert sample.cu_seqlens.tolist() == [0, 4]


def test_without_mask_labels_cross_documents():
    sample = cut_sample(stream_of([2, 6]), 0, 4, document_mask=False)
    assert sample.labels.tolist() == [1, 2, 3, 4]
    assert sample.cu_seqlens.tolist() == [0, 4]


def test_tokens_are_no_view_of_the_shard():
    split = stream_of([8])
    sample = cut_sample(split, 0, 4, document_mask=True)
    sample.tokens[:] = 9
    assert split.tokens[0] == 0


def test_ends_beyond_the_precision_of_float64():
    """A search that converts the ends to float64 would put this border at an even number."""
    border = 2**53 + 1

    class Tokens:
        def __getitem__(self, span: slice) -> np.ndarray:
            return np.arange(span.stop - span.start)

    split = Split(Tokens(), np.array([border, 2**60], np.uint64), 0, "")  # type: ignore[arg-type]
    assert cut_sample(split, border - 1, 4, True).cu_seqlens.tolist() == [0, 1, 4]
    assert cut_sample(split, border, 4, True).cu_seqlens.tolist() == [0, 4]


def test_epochs_and_seeds_differ():
    stream = stream_of([400])
    samples, other_seed = mix(stream, seq_len=1), mix(stream, seq_len=1, seed=2)
    orders = [[samples.locate(i).window for i in range(e * 399, (e + 1) * 399)] for e in range(3)]
    orders.append([other_seed.locate(i).window for i in range(399)])
    assert len({tuple(order) for order in orders}) == 4


@given(weights=weight_lists)
@settings(deadline=None)
def test_quotas_are_exact(weights: list[float]):
    slots = quotas(weights)
    assert sum(slots) == BLOCK
    total = sum(map(Fraction, weights))
    for quota, weight in zip(slots, weights, strict=True):
        assert abs(quota - Fraction(weight) / total * BLOCK) < 1 + 1e-9


@given(weights=weight_lists, block=st.integers(0, 2**80), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_every_block_keeps_the_quotas_and_skips_no_window(
    weights: list[float], block: int, seed: int
):
    """Wherever a block starts, its samples of a source go on where the block before it stopped."""
    lengths = [7 + 10 * q for q in range(len(weights))]
    samples = mix(*(stream_of([n]) for n in lengths), weights=weights, seq_len=1, seed=seed)
    places = [samples.locate(i) for i in range(block * BLOCK, (block + 1) * BLOCK)]
    for q, quota in enumerate(quotas(weights)):
        mine = [place for place in places if place.source == q]
        assert len(mine) == quota
        windows = lengths[q] - 1
        assert [p.epoch for p in mine] == [(block * quota + n) // windows for n in range(quota)]
        complete = {p.epoch for p in mine[windows:-windows]}
        for epoch in complete:
            assert sorted(p.window for p in mine if p.epoch == epoch) == list(range(windows))


def test_sources_are_mixed_not_in_turns():
    samples = mix(stream_of([99]), stream_of([99]), seq_len=1)
    sources = [samples.locate(i).source for i in range(64)]
    assert 16 < sum(sources) < 48
    assert sources != sorted(sources)


def test_equal_sources_have_orders_of_their_own():
    samples = mix(stream_of([999]), stream_of([999]), seq_len=1)
    places = [samples.locate(i) for i in range(1000)]
    first, second = ([p.window for p in places if p.source == q] for q in range(2))
    assert first[:100] != second[:100]


@pytest.mark.parametrize("index", [0, 4095, 4096, 10**12 + 7, 10**30])
def test_resume_anywhere(index: int):
    """A new process needs the index alone, however far the run is."""
    streams = [stream_of([5, 300]), stream_of([1000], first_token=10_000)]
    first, second = (mix(*streams, weights=[3, 1]) for _ in range(2))
    for i in range(3):
        first[i]  # reading leaves nothing behind
    a, b = first[index], second[index]
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.labels.tolist() == b.labels.tolist()
