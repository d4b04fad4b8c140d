import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megallama_kernels import cross_entropy
from megallama_kernels.linear_cross_entropy import (
    FUSED,
    PLAIN,
    linear_cross_entropy,
    loss_and_gradients,
)
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.checks import DTYPES, assert_near, random

IGNORED = -100
SCALE = 0.25


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", 16)


def exact(x, weight, labels, vocab, upstream=1.0):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = (x @ weight.t())[:, :vocab]
    loss = SCALE * F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return loss, *torch.autograd.grad(upstream * loss, (x, weight))


def some_labels(data, rows, vocab):
    label = st.one_of(st.just(IGNORED), st.integers(0, vocab - 1))
    return torch.tensor(data.draw(st.lists(label, min_size=rows, max_size=rows)), dtype=torch.int64)


def assert_loss_near(found, exact, dtype):
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert abs(found.item() - exact.item()) <= tolerance * max(1.0, exact.item())


@pytest.mark.parametrize("ops", [FUSED, PLAIN], ids=["fused", "plain"])
@settings(max_examples=25)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 50),
    padding=st.integers(0, 20),
    chunk=st.integers(1, 10),
    dtype=DTYPES,
    data=st.data(),
)
def test_loss_and_gradients_in_chunks(ops, rows, vocab, padding, chunk, dtype, data):
    x = random(rows, 8, dtype=dtype)
    weight = random(vocab + padding, 8, dtype=dtype, seed=1)
    labels = some_labels(data, rows, vocab)
    found = loss_and_gradients(
        x, weight, labels, torch.tensor(SCALE), vocab=vocab, ops=ops, chunk_rows=chunk
    )
    loss, dx, dweight = exact(x, weight, labels, vocab)
    assert_loss_near(found.loss, loss, dtype)
    assert_near(found.dx, dx, dtype, "dx", size=SCALE)
    assert_near(found.dweight, dweight, dtype, "dweight", size=SCALE)
    assert found.dweight.dtype == torch.float32


@settings(max_examples=25)
@given(
    ranks=st.integers(1, 4),
    columns=st.integers(1, 20),
    padding=st.integers(0, 30),
    data=st.data(),
)
def test_columns_on_several_ranks(ranks, columns, padding, data):
    """Each rank's pass, with the exchange played by hand; some ranks may hold padding only."""
    V = ranks * columns
    vocab = max(1, V - padding)
    labels = some_labels(data, 5, vocab)
    x, weight = random(5, 8, dtype=torch.float32), random(V, 8, dtype=torch.float32, seed=1)
    parts = weight.split(columns)
    firsts = range(0, V, columns)
    sent = []
    for first, part in zip(firsts, parts, strict=True):
        real = max(0, min(columns, vocab - first))
        sent.append(FUSED.statistics(x @ part.t(), labels, first, real))
    gathered = torch.stack(sent)
    found = [
        loss_and_gradients(
            x,
            part,
            labels,
            torch.tensor(SCALE),
            vocab=vocab,
            first=first,
            chunk_rows=5,
            exchange=lambda _mine: gathered,
        )
        for first, part in zip(firsts, parts, strict=True)
    ]
    loss, dx, dweight = exact(x, weight, labels, vocab)
    for each in found:
        assert_loss_near(each.loss, loss, torch.float32)
    assert_near(sum(each.dx for each in found), dx, torch.float32, "dx", size=SCALE)
    assert_near(
        torch.cat([e.dweight for e in found]), dweight, torch.float32, "dweight", size=SCALE
    )


def test_a_gradient_from_above_and_bf16_weights():
    x = random(7, 8, dtype=torch.bfloat16).requires_grad_()
    weight = random(20, 8, dtype=torch.bfloat16, seed=1).requires_grad_()
    labels = torch.tensor([3, 19, IGNORED, 0, 0, 7, 18])
    loss = linear_cross_entropy(x, weight, labels, torch.tensor(SCALE), vocab=20, chunk_rows=3)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(3 * loss, (x, weight))
    assert [g.dtype for g in found] == [torch.bfloat16] * 2
    for mine, true in zip(found, exact(x, weight, labels, 20, upstream=3.0)[1:], strict=True):
        assert_near(mine, true, torch.bfloat16)


def test_large_logits_do_not_overflow():
    weight = torch.eye(4) * 1000
    labels = torch.tensor([0, 1])
    x = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, labels, torch.tensor(1.0), vocab=4, chunk_rows=2)
    assert loss.item() == 1000.0
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.tolist() == [[0.0] * 4, [1000.0, -1000.0, 0.0, 0.0]]


@pytest.mark.parametrize("ops", [FUSED, PLAIN], ids=["fused", "plain"])
def test_float64_passes_gradcheck(ops):
    x, weight = random(5, 4).requires_grad_(), random(9, 4, seed=1).requires_grad_()
    labels = torch.tensor([3, 6, IGNORED, 0, 0])
    scale = torch.tensor(SCALE, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, labels, scale, vocab=7, chunk_rows=2, ops=ops),
        (x, weight),
    )


def test_without_gradients_none_are_made():
    x, weight = random(5, 4), random(9, 4, seed=1)
    labels = torch.tensor([3, 6, IGNORED, 0, 0])
    one = torch.ones((), dtype=torch.float64)
    found = loss_and_gradients(x, weight, labels, one, vocab=9, gradients=False, chunk_rows=2)
    assert found.dx is None
    assert found.dweight is None
    weight.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, labels, one, vocab=9, chunk_rows=2)
    assert counter.get_total_flops() == 2 * 5 * 4 * 9
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, labels, one, vocab=9, chunk_rows=2).backward()
    assert counter.get_total_flops() == 6 * 5 * 4 * 9


def test_ops_are_registered_as_torch_wants():
    logits, labels = random(3, 5, dtype=torch.float32), torch.tensor([1, IGNORED, 4])
    torch.library.opcheck(torch.ops.megallama.cross_entropy_statistics, (logits, labels, 0, 5))
    log_sum_exp = logits.logsumexp(-1)
    torch.library.opcheck(
        torch.ops.megallama.cross_entropy_gradient_,
        (logits, labels, log_sum_exp, torch.tensor(1.0), 0, 5),
    )


def test_peak_memory_does_not_grow_with_vocabulary_times_tokens():
    """Eight times the tokens at the same chunk: the peak grows by x and dx, not by logits."""
    rows, vocab, d = 64, 4096, 8
    peaks = {}
    for tokens in (rows, 8 * rows):
        x = random(tokens, d, dtype=torch.float32).cpu()
        weight = random(vocab, d, dtype=torch.float32, seed=1).cpu()
        labels = torch.zeros(tokens, dtype=torch.int64, device="cpu")
        with torch.profiler.profile(profile_memory=True) as profile:
            loss_and_gradients(
                x, weight, labels, torch.tensor(1.0).cpu(), vocab=vocab, ops=PLAIN, chunk_rows=rows
            )
        peaks[tokens] = peak_bytes(profile)
    logits = rows * vocab * 4
    assert peaks[rows] >= logits
    assert peaks[8 * rows] - peaks[rows] <= 0.1 * logits


def peak_bytes(profile):
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
