"""Angles of rotary position embedding (Su et al. 2021) with Llama 3.1's frequency scaling."""

import math

import torch
from torch import Tensor

from megallama.config.schema import ModelConfig, RopeScaling


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
    config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions 0 … length - 1, `[length, head_dim/2]` each.

    Angles are taken in float64: in float32 they are off by 8e-3 rad at position 131,072.
    """
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, inverse_frequencies(config).to(device))
    return angles.cos().to(dtype), angles.sin().to(dtype)
