import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.batch import micro_batches, pack, sample_indices
from megallama.data.sampler import Sample

sizes = st.integers(1, 6)


@st.composite
def rows(draw: st.DrawFn, seq_len: int = 8) -> Sample:
    inner = draw(st.sets(st.integers(1, seq_len - 1)))
    tokens = draw(st.lists(st.integers(0, 511), min_size=seq_len, max_size=seq_len))
    labels = draw(st.lists(st.integers(-100, 511), min_size=seq_len, max_size=seq_len))
    borders = np.array([0, *sorted(inner), seq_len], dtype=np.int32)
    return Sample(np.array(tokens), np.array(labels), borders)


class Numbered:
    """Sample i is a row of the number i."""

    def __getitem__(self, index: int) -> Sample:
        row = np.full(4, index)
        return Sample(row, row, np.array([0, 3, 4], dtype=np.int32))


@given(samples=st.lists(rows(), min_size=1, max_size=4))
@settings(deadline=None)
def test_pack(samples: list[Sample]):
    batch = pack(samples)
    T = 8 * len(samples)
    assert batch.tokens.tolist() == [token for s in samples for token in s.tokens.tolist()]
    assert batch.labels.tolist() == [label for s in samples for label in s.labels.tolist()]
    for tensor in (batch.tokens, batch.labels, batch.position_ids):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (T,)
        assert tensor.is_contiguous()

    borders = batch.cu_seqlens
    assert all(type(border) is int for border in borders)
    assert (borders[0], borders[-1]) == (0, T)
    assert list(borders) == sorted(set(borders))
    assert set(range(0, T + 1, 8)) <= set(borders)
    expected = {8 * n + int(b) for n, s in enumerate(samples) for b in s.cu_seqlens}
    assert set(borders) == expected

    position, positions = 0, []
    for t in range(T):
        position = 0 if t in borders else position + 1
        positions.append(position)
    assert batch.position_ids.tolist() == positions


def test_pack_copies():
    sample = Numbered()[1]
    pack([sample]).tokens[:] = 7
    assert sample.tokens.tolist() == [1, 1, 1, 1]


@given(step=st.integers(0, 2**60), micro_batch=sizes, dp_size=sizes, micro_steps=sizes)
def test_layout_never_changes_what_a_step_reads(
    step: int, micro_batch: int, dp_size: int, micro_steps: int
):
    global_samples = micro_batch * dp_size * micro_steps
    ranks = [
        sample_indices(step, global_samples, micro_batch, rank, dp_size) for rank in range(dp_size)
    ]
    assert all(len(rank) == micro_steps for rank in ranks)
    assert all(len(rows) == micro_batch for rank in ranks for rows in rank)
    together = [i for m in range(micro_steps) for rank in ranks for i in rank[m]]
    assert together == list(range(step * global_samples, (step + 1) * global_samples))


def test_formula():
    """base + m · micro_batch · dp_size + rank · micro_batch + row"""
    assert sample_indices(3, 16, 2, dp_rank=1, dp_size=4) == [[50, 51], [58, 59]]


@pytest.mark.parametrize(("global_samples", "micro_batch", "dp_size"), [(10, 4, 1), (10, 1, 4)])
def test_uneven(global_samples: int, micro_batch: int, dp_size: int):
    with pytest.raises(ValueError, match="no multiple"):
        sample_indices(0, global_samples, micro_batch, 0, dp_size)


def test_micro_batches():
    batches = micro_batches(Numbered(), 2, global_samples=8, micro_batch=2, dp_rank=1, dp_size=2)
    assert [batch.tokens[::4].tolist() for batch in batches] == [[18, 19], [22, 23]]
    assert batches[0].cu_seqlens == (0, 3, 4, 7, 8)
