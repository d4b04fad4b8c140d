"""A Llama of a few thousand weights, and packed documents for it."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megallama.config.schema import ModelConfig
from megallama.model.attention import AttentionPlan, plan_attention
from megallama.model.init import initialize
from megallama.model.llama import Llama


def small_config(**changes: Any) -> ModelConfig:
    shape = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48}
    return ModelConfig(**(shape | {"vocab": 200} | changes))


def small_model(config: ModelConfig, dtype: torch.dtype, seed: int = 1) -> Llama:
    """Initial weights, but larger than those of a real run, and norm weights that are not all 1."""
    model = Llama(config).to(dtype)
    initialize(model, config, seed)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
            else:
                parameter *= 8
    return model


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def positions_of(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def plan_of(config: ModelConfig, lengths: list[int], dtype: torch.dtype) -> AttentionPlan:
    return plan_attention(config, positions_of(lengths), borders_of(lengths), dtype=dtype)
