import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megallama_kernels import rms_norm
from megallama_kernels.rms_norm import add_rms_norm
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.checks import DTYPES, STRIDES, assert_near, laid_out, random

EPS = 1e-5
ROWS = st.integers(0, 40)
COLUMNS = st.integers(1, 130)


def size_of_terms(x, weight, dy):
    """Of what the gradient is a difference of; in short rows little is left of it."""
    rstd = torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + EPS)
    return max(1e-3, (dy.double() * weight.detach() * rstd).abs().max().item() if len(x) else 0.0)


@settings(max_examples=40)
@given(ROWS, COLUMNS, DTYPES, STRIDES, STRIDES)
def test_norm_and_gradients(rows, columns, dtype, strides, grad_strides):
    x = laid_out(random(rows, columns, dtype=dtype), strides).requires_grad_()
    weight = random(columns, dtype=dtype, seed=1).requires_grad_()
    dy = laid_out(random(rows, columns, dtype=dtype, seed=2), grad_strides)
    y = rms_norm.rms_norm(x, weight, EPS)
    found = torch.autograd.grad(y, (x, weight), dy)
    wide, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact_y = F.rms_norm(wide, (columns,), wide_weight, EPS)
    exact = torch.autograd.grad(exact_y, (wide, wide_weight), dy.double())
    assert_near(y, exact_y, dtype, "y")
    assert_near(found[0], exact[0], dtype, "dx", size=size_of_terms(wide, wide_weight, dy))
    assert_near(found[1], exact[1], dtype, "dweight")


@settings(max_examples=40)
@given(ROWS, COLUMNS, DTYPES, STRIDES, STRIDES, st.booleans())
def test_norm_of_a_sum(rows, columns, dtype, strides, others, both):
    x = laid_out(random(rows, columns, dtype=dtype), strides).requires_grad_()
    residual = laid_out(random(rows, columns, dtype=dtype, seed=3), others).requires_grad_()
    weight = random(columns, dtype=dtype, seed=1).requires_grad_()
    dy = random(rows, columns, dtype=dtype, seed=2)
    dstream = laid_out(random(rows, columns, dtype=dtype, seed=4), others)
    y, stream = add_rms_norm(x, residual, weight, EPS)
    wanted, given_ = ((y, stream), (dy, dstream)) if both else ((y,), (dy,))
    found = torch.autograd.grad(wanted, (x, residual, weight), given_)
    # The sum is rounded before it is normed: that rounding is part of the definition.
    wide = stream.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    exact_y = F.rms_norm(wide, (columns,), wide_weight, EPS)
    exact = torch.autograd.grad(exact_y, (wide, wide_weight), dy.double())
    dx = exact[0] + dstream.double() if both else exact[0]
    assert_near(stream, x.detach().double() + residual.detach().double(), dtype, "stream")
    assert_near(y, exact_y, dtype, "y")
    assert_near(found[0], dx, dtype, "dx", size=size_of_terms(wide, wide_weight, dy))
    assert torch.equal(found[0], found[1])
    assert_near(found[2], exact[1], dtype, "dweight")


def test_long_rows_with_a_residual(monkeypatch):
    monkeypatch.setattr(rms_norm, "LONG", 64)
    test_norm_of_a_sum.hypothesis.inner_test(5, 64, torch.float32, "contiguous", "rows apart", True)


def test_one_gradient_of_a_sum_may_be_missing():
    x, residual = (random(4, 8).requires_grad_() for _ in range(2))
    weight = random(8, seed=1).requires_grad_()
    _, stream = add_rms_norm(x, residual, weight, EPS)
    dx, dresidual = torch.autograd.grad(stream.sum(), (x, residual))
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(dx, dresidual)


def test_float64_passes_gradcheck():
    x, residual = (random(3, 5, seed=s).requires_grad_() for s in (0, 1))
    weight = random(5, seed=2).requires_grad_()
    torch.autograd.gradcheck(lambda x, w: rms_norm.rms_norm(x, w, EPS), (x, weight))
    torch.autograd.gradcheck(lambda *a: add_rms_norm(*a, EPS), (x, residual, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ops_are_registered_as_torch_wants(dtype):
    x, residual = (random(3, 5, dtype=dtype, seed=s).requires_grad_() for s in (0, 1))
    weight = random(5, dtype=dtype, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.megallama.rms_norm, (x, weight, EPS))
    torch.library.opcheck(torch.ops.megallama.add_rms_norm, (x, residual, weight, EPS))


def test_compiled_as_one_graph():
    x, residual = (random(3, 5, dtype=torch.float32, seed=s).requires_grad_() for s in (0, 1))
    weight = random(5, dtype=torch.float32, seed=2).requires_grad_()

    def f(x, residual, weight):
        y, stream = add_rms_norm(x, residual, weight, EPS)
        return (y * 2 + stream).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, residual, weight), (x, residual, weight))
    eager = torch.autograd.grad(f(x, residual, weight), (x, residual, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


def test_it_counts_as_no_model_flops():
    x, weight = random(3, 5).requires_grad_(), random(5, seed=1).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        rms_norm.rms_norm(x, weight, EPS).sum().backward()
    assert counter.get_total_flops() == 0
