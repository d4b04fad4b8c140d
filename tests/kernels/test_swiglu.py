import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megallama_kernels.swiglu import swiglu

from tests.kernels.checks import DTYPES, STRIDES, assert_near, laid_out, random


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(0, 70), DTYPES, STRIDES, STRIDES)
def test_activation_and_gradient(rows, features, dtype, strides, grad_strides):
    values = 3 * random(rows, features, 2, dtype=dtype)
    packed = laid_out(values, strides).detach().requires_grad_()
    dy = laid_out(random(rows, features, dtype=dtype, seed=1), grad_strides)
    y = swiglu(packed)
    (found,) = torch.autograd.grad(y, packed, dy)
    wide = packed.detach().double().requires_grad_()
    exact_y = F.silu(wide[..., 0]) * wide[..., 1]
    (exact,) = torch.autograd.grad(exact_y, wide, dy.double())
    assert_near(y, exact_y, dtype, "y")
    assert_near(found, exact, dtype, "dpacked")


def test_a_slice_of_features():
    packed = random(3, 40, 2, dtype=torch.float32)[:, 8:20]
    assert_near(swiglu(packed), F.silu(packed[..., 0].double()) * packed[..., 1], torch.float32)


def test_more_features_than_a_tile():
    packed = random(2, 1500, 2, dtype=torch.float32).requires_grad_()
    y = swiglu(packed)
    (found,) = torch.autograd.grad(y.sum(), packed)
    wide = packed.detach().double().requires_grad_()
    exact_y = F.silu(wide[..., 0]) * wide[..., 1]
    (exact,) = torch.autograd.grad(exact_y.sum(), wide)
    assert_near(y, exact_y, torch.float32)
    assert_near(found, exact, torch.float32)


def test_large_gates_neither_overflow_nor_vanish():
    packed = torch.tensor([[[200.0, 2.0], [-200.0, 2.0]]], requires_grad=True)
    y = swiglu(packed)
    assert y.tolist() == [[400.0, 0.0]]
    (found,) = torch.autograd.grad(y.sum(), packed)
    assert found.tolist() == [[[2.0, 200.0], [0.0, 0.0]]]


def test_float64_passes_gradcheck():
    torch.autograd.gradcheck(swiglu, (random(3, 5, 2).requires_grad_(),))


def test_op_is_registered_as_torch_wants():
    for dtype in (torch.float32, torch.float64):
        packed = random(3, 5, 2, dtype=dtype).requires_grad_()
        torch.library.opcheck(torch.ops.megallama.swiglu, (packed,))
