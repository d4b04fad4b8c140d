"""Rotary position embedding (Su et al. 2021) with Llama 3.1's frequency scaling.

Features are paired as Hugging Face does: feature i with feature i + head_dim/2.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megallama.config.schema import ModelConfig, RopeScaling
from megallama.model.precision import at_least_float32


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position for each feature pair, `[head_dim/2]` float64.

    Scaling follows Llama 3.1's reference code: long wavelengths are stretched by `factor`, short
    ones kept, those between blended.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    return frequencies if scaling is None else _scaled(frequencies, scaling)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((scaling.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def table_dtype(activations: torch.dtype) -> torch.dtype:
    """What cosines and sines are kept in: at least float32."""
    return torch.float64 if activations == torch.float64 else torch.float32


def rotary_table(
    config: ModelConfig, position_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each token, `[T, 1, head_dim/2]` each, on the positions' device.

    Angles are taken in float64: in float32 they are off by 8e-3 rad at position 131,072.
    """
    inverse = inverse_frequencies(config).to(position_ids.device)
    angles = torch.outer(position_ids.to(torch.float64), inverse)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    """Backward turns the other way; nothing but the tables is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, H, head_dim]` rotated by its tokens' angles; computed in the table's precision."""
    return _Rotate.apply(x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = at_least_float32(x).chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)
