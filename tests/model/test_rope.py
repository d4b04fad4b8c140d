"""Rotary frequencies, tables and rotation against 40-digit arithmetic and transformers."""

import math
from functools import cache
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from megallama_kernels.rope import reference as rotate

from megallama.config import shipped
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.model.rope import inverse_frequencies, rotary_table
from tests.model.small import small_config

FAR = 131_071
SCALINGS = {"llama-3.1": RopeScaling(factor=8.0), "llama-3.2": RopeScaling(factor=32.0)}
scalings = pytest.mark.parametrize("scaling", [None, *SCALINGS.values()], ids=["none", *SCALINGS])


@cache
def table_to(config, last, dtype):
    """For positions up to `last`."""
    return rotary_table(config, last + 1, dtype, torch.device("cpu"))


def table_at(config, positions, dtype):
    return tuple(table[positions] for table in table_to(config, max(positions), dtype))


def preset(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load(shipped.text("models", name)))


def exact_frequencies(config: ModelConfig) -> list[mpmath.mpf]:
    """The published definition, pair by pair."""
    frequencies = []
    for pair in range(config.head_dim // 2):
        f = mpmath.mpf(config.rope_theta) ** (mpmath.mpf(-2 * pair) / config.head_dim)
        s = config.rope_scaling
        if s is not None:
            wavelength = 2 * mpmath.pi / f
            if wavelength > s.original_context / s.low_freq_factor:
                f = f / s.factor
            elif wavelength > s.original_context / s.high_freq_factor:
                smooth = s.original_context / wavelength - s.low_freq_factor
                smooth /= s.high_freq_factor - s.low_freq_factor
                f = (1 - smooth) * f / s.factor + smooth * f
        frequencies.append(f)
    return frequencies


@scalings
@pytest.mark.parametrize("head_dim", [64, 128])
def test_inverse_frequencies_are_exact(scaling: RopeScaling | None, head_dim: int):
    config = small_config(head_dim=head_dim, rope_scaling=scaling)
    with mpmath.workdps(40):
        expected = np.array([float(f) for f in exact_frequencies(config)])
    found = inverse_frequencies(config)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)


def test_scaling_meets_all_three_bands():
    """Else the tests above would not see a band."""
    plain = inverse_frequencies(small_config(head_dim=128))
    scaled = inverse_frequencies(small_config(head_dim=128, rope_scaling=SCALINGS["llama-3.1"]))
    ratio = plain / scaled
    kept, stretched = ratio < 1 + 1e-12, ratio > 8 - 1e-12
    assert kept.any()
    assert stretched.any()
    assert (~kept & ~stretched).any()


@pytest.mark.parametrize("name", ["llama3.1_8b", "llama3.2_1b", "llama3_8b"])
def test_inverse_frequencies_of_presets_equal_hugging_face(name: str):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = preset(name)
    scaling = config.rope_scaling
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    expected = config.rope_theta**-exponents
    if scaling is not None:
        parameters: dict[str, Any] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
        theirs = transformers.LlamaConfig(
            hidden_size=config.hidden,
            num_attention_heads=config.heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            rope_scaling=parameters,
            max_position_embeddings=131_072,
        )
        expected, factor = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
        assert factor == 1.0
    torch.testing.assert_close(inverse_frequencies(config), expected.double(), rtol=1e-6, atol=0)


@scalings
def test_tables_are_right_at_far_positions(scaling: RopeScaling | None):
    config = small_config(head_dim=128, rope_scaling=scaling)
    positions = [0, 1, 511, 8191, 65_537, FAR]
    cos, sin = table_at(config, positions, torch.float64)
    assert cos.shape == sin.shape == (len(positions), 64)
    with mpmath.workdps(40):
        angles = [[p * f for f in exact_frequencies(config)] for p in positions]
        expected_cos = np.array([[float(mpmath.cos(a)) for a in row] for row in angles])
        expected_sin = np.array([[float(mpmath.sin(a)) for a in row] for row in angles])
    # a frequency in float64 is off by up to 1e-16 of itself: 131,071 times that is the bar
    np.testing.assert_allclose(cos.numpy(), expected_cos, rtol=0, atol=5e-11)
    np.testing.assert_allclose(sin.numpy(), expected_sin, rtol=0, atol=5e-11)
    narrow = table_at(config, positions, torch.float32)
    assert narrow[0].dtype == narrow[1].dtype == torch.float32
    np.testing.assert_allclose(narrow[0].numpy(), expected_cos, rtol=0, atol=6e-8)
    np.testing.assert_allclose(narrow[1].numpy(), expected_sin, rtol=0, atol=6e-8)


def test_rotation_turns_feature_i_with_feature_i_plus_half():
    config = small_config(head_dim=8, rope_scaling=SCALINGS["llama-3.1"])
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 4000, FAR], dtype=torch.int32)
    turned = rotate(x, *table_to(config, FAR, torch.float64), positions)
    frequencies = inverse_frequencies(config)
    for t in range(5):
        for head in range(3):
            for pair in range(4):
                z = complex(x[t, head, pair], x[t, head, pair + 4])
                angle = positions[t].item() * frequencies[pair].item()
                expected = z * complex(math.cos(angle), math.sin(angle))
                found = complex(turned[t, head, pair], turned[t, head, pair + 4])
                assert abs(found - expected) < 1e-10


@given(first=st.integers(0, 60_000), second=st.integers(0, 60_000), shift=st.integers(0, 60_000))
def test_scores_depend_on_distance_alone(first: int, second: int, shift: int):
    config = small_config(head_dim=16, rope_scaling=SCALINGS["llama-3.2"])
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    tables = table_to(config, 120_000, torch.float64)

    def score(i: int, j: int) -> float:
        at_i, at_j = (torch.tensor([place], dtype=torch.int32) for place in (i, j))
        return (rotate(q, *tables, at_i) * rotate(k, *tables, at_j)).sum().item()

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=1e-8)


def test_bfloat16_is_rotated_in_the_tables_precision():
    config = small_config(head_dim=8)
    x = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    tables = *table_to(config, 3000, torch.float32), torch.arange(4, dtype=torch.int32) * 1000
    turned = rotate(x, *tables)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), *tables).bfloat16())
