"""What tests of kernels share: inputs with any strides, and how near a result must be."""

import torch
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {
    torch.float32: 3e-6,
    torch.bfloat16: 2e-2,  # two roundings of 2^-8: the interpreter cuts off where a GPU rounds
    torch.float16: 3e-3,
}
"""Of the largest element."""
DTYPES = st.sampled_from(list(TOLERANCE))
STRIDES = st.sampled_from(["contiguous", "rows apart", "columns apart", "transposed", "expanded"])


def laid_out(values: Tensor, strides: str) -> Tensor:
    """The values of `[..., R, C]` in another layout of memory; `expanded` repeats the first row."""
    if strides == "rows apart":
        wide = values.new_zeros(*values.shape[:-1], values.shape[-1] + 3)
        wide[..., :-3] = values
        return wide[..., :-3]
    if strides == "columns apart":
        wide = values.new_zeros(*values.shape, 2)
        wide[..., 0] = values
        return wide[..., 0]
    if strides == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "expanded":
        return values[:1].expand_as(values) if len(values) else values
    return values


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers on the device that is the default, the same on all."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def assert_near(
    found: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "", size: float = 1e-3
) -> None:
    """Within the dtype's tolerance of float64 numbers; `size` is that of what cancelled out."""
    assert found.shape == exact.shape, what
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    error = (found.double() - exact).abs().max() / exact.abs().max().clamp(min=size)
    assert error <= TOLERANCE[dtype], f"{what}: {error:.1e}"
