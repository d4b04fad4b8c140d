"""The squared norm of many tensors, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megallama_kernels.grad_norm import launch, squared_norm
from megallama_kernels.language import launches
from megallama_kernels.multi_tensor import chunks
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = 256
"""Elements of a chunk: the interpreter takes milliseconds a program."""
SIZES = st.sampled_from([0, 1, 15, 16, 17, 255, 256, 257, 1000])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(sizes: list[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(DEVICE, dtype) for n in sizes]


def exact(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten().double() for x in tensors]).square().sum()


def assert_squared_norm(found: Tensor, tensors: list[Tensor]) -> None:
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), exact(tensors), rtol=1e-6, atol=0)


def test_these_tests_run_the_kernel() -> None:
    assert launches(torch.empty(0, device=DEVICE))


@settings(max_examples=20)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_sizes(sizes: list[int], dtype: torch.dtype, seed: int) -> None:
    tensors = draw(sizes, dtype, seed)
    assert_squared_norm(launch(tensors, SMALL), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_goes_over_several_blocks(dtype: torch.dtype) -> None:
    tensors = draw([9000, 4096, 5], dtype)
    assert_squared_norm(squared_norm(tensors), tensors)


def test_agrees_with_torch_on_any_shapes() -> None:
    cube, point, square = draw([24, 1, 64], torch.float32)
    not_contiguous = square.view(8, 8).T[:5]
    tensors = [cube.view(2, 3, 4), point.view(()), not_contiguous]
    norm = torch.nn.utils.get_total_norm(tensors)
    torch.testing.assert_close(squared_norm(tensors).sqrt(), norm, rtol=1e-6, atol=0)


def test_tensors_that_lie_at_odd_addresses() -> None:
    tensors = [x[1:] for x in draw([100, 600], torch.bfloat16)]
    assert_squared_norm(launch(tensors, SMALL), tensors)


def test_squares_of_float16_do_not_overflow() -> None:
    tensors = [torch.full((20,), 60000.0, dtype=torch.float16, device=DEVICE)]
    assert_squared_norm(squared_norm(tensors), tensors)


def test_nothing_has_norm_zero() -> None:
    assert squared_norm(draw([0, 0], torch.float32)) == 0


def test_autograd_does_not_follow() -> None:
    (x,) = draw([3], torch.float32)
    assert not squared_norm([x.requires_grad_()]).requires_grad


def test_not_a_number_stays_visible() -> None:
    (x,) = draw([300], torch.float32)
    x[299] = torch.nan
    assert launch([x], SMALL).isnan()


def test_float64_stays_float64() -> None:
    tensors = draw([17, 3], torch.float64)
    torch.testing.assert_close(squared_norm(tensors), exact(tensors), rtol=1e-14, atol=0)


def test_one_list_is_one_dtype() -> None:
    with pytest.raises(ValueError, match="several dtypes"):
        squared_norm([*draw([3], torch.float32), *draw([3], torch.bfloat16)])


@given(lengths=st.lists(st.integers(0, 100), max_size=6), chunk=st.sampled_from([16, 48]))
def test_chunks_cover_every_element_once(lengths: list[int], chunk: int) -> None:
    found = [
        (tensor, offset + i)
        for tensor, offset, length in chunks(tuple(lengths), chunk, torch.device("cpu")).tolist()
        for i in range(length)
    ]
    assert found == [(tensor, i) for tensor, n in enumerate(lengths) for i in range(n)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_op_is_registered_as_torch_asks(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.megallama.squared_norm, (draw([5, 0, 20], dtype),))
