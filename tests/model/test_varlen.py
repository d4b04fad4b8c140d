"""Variable-length calls, with FlashAttention's rules played in float64, against the definition."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import list_flash_attention_impls

from megallama.model import varlen
from megallama.model.attention import _in_chunks, plan_attention, reference_attention, stream_index
from megallama.model.varlen import attend_in_chunks, chunks_of, runs_of
from megallama.parallel.context.split import SPLITS
from tests.model.small import borders_of, positions_of, small_config
from tests.model.test_attention import random_qkv

CPU = torch.device("cpu")


def by_the_rules(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    **grouped: bool,
) -> Tensor:
    """Query i of n sees keys up to m - n + i of m: the mask is aligned at the bottom right."""
    assert window_size == (-1, 0)
    assert grouped == varlen.GROUPED
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(q), len(k))
    outs = []
    for (q0, q1), (k0, k1) in zip(
        pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
    ):
        n, m = q1 - q0, k1 - k0
        assert n <= max_q
        assert m <= max_k
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        heads = [x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=mask, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths of documents, and context ranks that cut their sum into two parts each."""
    ranks = draw(st.sampled_from([1, 2, 4]))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    lengths[-1] += -sum(lengths) % (2 * ranks)
    return lengths, ranks


@settings(max_examples=60)
@given(streams())
def test_every_rank_of_a_head_and_tail_split(stream: tuple[list[int], int]):
    lengths, ranks = stream
    borders, T = borders_of(lengths), sum(lengths)
    q, k, v = (x.detach() for x in random_qkv(T, 4, 2))
    expected = reference_attention(q, k, v, borders)
    for spans in SPLITS["head_tail"](borders, ranks):
        plan = plan_attention(
            small_config(), positions_of(lengths), borders, dtype=torch.float64, queries=spans
        )
        chunks = chunks_of(runs_of(plan.segments), CPU)
        assert len(chunks) <= 2
        held = stream_index(spans, CPU)
        with mock.patch.object(varlen, "varlen_attn", by_the_rules):
            out = attend_in_chunks(q[held], k, v, chunks)
        torch.testing.assert_close(out, expected[held], rtol=1e-12, atol=1e-12)


def test_the_whole_stream_is_one_call():
    lengths = [5, 1, 12, 6]
    config, positions = small_config(), positions_of(lengths)
    plan = plan_attention(config, positions, borders_of(lengths), dtype=torch.float32)
    (chunk,) = chunks_of(runs_of(plan.segments), CPU)
    assert chunk.cu_seqlens_q.tolist() == chunk.cu_seqlens_k.tolist() == [0, 5, 6, 18, 24]
    assert (chunk.longest_q, chunk.longest_k) == (12, 12)


@pytest.mark.parametrize(
    ("packed_by", "calls", "partly", "chosen"),
    [
        ("auto", 2, True, True),
        ("auto", 1, False, False),  # all of the stream
        ("auto", 9, True, False),  # a head and a tail of every document
        ("auto", 0, True, False),  # float32
        ("varlen", 1, False, True),
        ("fa3", 1, False, True),
        ("varlen", 0, False, False),
        ("flex", 2, True, False),
    ],
)
def test_what_computes(packed_by: str, calls: int, partly: bool, chosen: bool):
    assert _in_chunks(packed_by, calls, partly=partly) is chosen


def test_torch_knows_flash_attention_3_by_the_name_we_use():
    assert "FA3" in list_flash_attention_impls()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("lengths", [[100, 28], [1, 127, 128, 44, 84]], ids=str)
def test_on_a_gpu_equals_the_reference(lengths: list[int], heads: tuple[int, int]):
    T, borders = sum(lengths), borders_of(lengths)
    qkv = random_qkv(T, *heads, K=64, device="cuda", dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference_attention(*wide, borders)
    for spans in SPLITS["head_tail"](borders, 2):
        held = stream_index(spans, torch.device("cuda"))
        plan = plan_attention(
            small_config(),
            positions_of(lengths).cuda(),
            borders,
            dtype=torch.bfloat16,
            queries=spans,
        )
        assert plan.chunks is not None
        out = attend_in_chunks(qkv[0][held], qkv[1], qkv[2], plan.chunks)
        assert (out.double() - expected[held]).norm() < 2e-2 * expected[held].norm()
        upstream = torch.randn_like(out)
        found = torch.autograd.grad(out, qkv, upstream)
        wanted = torch.autograd.grad(expected[held], wide, upstream.double(), retain_graph=True)
        for mine, true in zip(found, wanted, strict=True):
            assert (mine.double() - true).norm() < 4e-2 * true.norm()
