import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megallama_kernels.rope import reference, rotate

from tests.kernels.checks import DTYPES, assert_near, random

PLACES = 11


def tables(half, dtype=torch.float32):
    angles = random(PLACES, half, seed=7)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def complex_rotation(x, cos, sin, positions):
    """Feature pairs as complex numbers, in float64."""
    first, second = x.double().chunk(2, -1)
    turn = torch.complex(cos.double(), sin.double())[positions.long()][:, None]
    turned = torch.complex(first, second) * turn
    return torch.cat([turned.real, turned.imag], -1)


@settings(max_examples=40)
@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 20), DTYPES, st.data())
def test_heads_of_a_packed_projection(tokens, heads, half, dtype, data):
    at = st.lists(st.integers(0, PLACES - 1), min_size=tokens, max_size=tokens)
    positions = torch.tensor(data.draw(at), dtype=torch.int32)
    kv = random(tokens, heads, 2, 2 * half, dtype=dtype).requires_grad_()
    dy = random(tokens, heads, 2 * half, dtype=dtype, seed=1)
    cos, sin = tables(half)
    y = rotate(kv[:, :, 0], cos, sin, positions)
    (found,) = torch.autograd.grad(y, kv, dy)
    assert_near(y, complex_rotation(kv.detach()[:, :, 0], cos, sin, positions), dtype, "y")
    assert_near(found[:, :, 0], complex_rotation(dy, cos, -sin, positions), dtype, "dk")
    assert not found[:, :, 1].any()


def test_many_heads_take_several_programs():
    x = random(40, 9, 16, dtype=torch.float32)
    cos, sin = tables(8)
    positions = torch.arange(40, dtype=torch.int32) % PLACES
    y = rotate(x.transpose(0, 1).contiguous().transpose(0, 1), cos, sin, positions)
    assert_near(y, complex_rotation(x, cos, sin, positions), torch.float32)


def test_float64_passes_gradcheck_as_op_and_reference():
    x = random(3, 2, 6).requires_grad_()
    cos, sin = tables(3, torch.float64)
    positions = torch.tensor([4, 0, 4], dtype=torch.int32)
    torch.autograd.gradcheck(lambda x: rotate(x, cos, sin, positions), (x,))
    torch.autograd.gradcheck(lambda x: reference(x, cos, sin, positions), (x,))
    assert torch.equal(rotate(x, cos, sin, positions), reference(x, cos, sin, positions))


def test_op_is_registered_as_torch_wants():
    cos, sin = tables(3)
    x = random(3, 2, 6, dtype=torch.float32).requires_grad_()
    positions = torch.tensor([4, 0, 4], dtype=torch.int32)
    torch.library.opcheck(torch.ops.megallama.rotate, (x, cos, sin, positions, 1))
