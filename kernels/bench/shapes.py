"""The sizes that kernels are timed at: Llama's, from `configs/models`, at 8,192 tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import yaml

MODELS = {
    "1b": "llama3.2_1b",
    "8b": "llama3.1_8b",
    "70b": "llama3.1_70b",
    "405b": "llama3.1_405b",
}
"""Files of `configs/models` by the names that the command takes."""
TENSOR_RANKS = {"70b": 4, "405b": 8}
"""Ranks that share a block's 0.9 and 3.2 billion weights in the optimizer's cases, so that they fit
with their state and a check; 1 for models not named."""

FOLDER = Path(__file__).parents[2] / "configs" / "models"


@dataclass(frozen=True)
class Shape:
    """Of one model."""

    name: str
    tokens: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    rope_theta: float
    tensor_ranks: int = 1

    @property
    def block_weights(self) -> list[tuple[int, ...]]:
        """Sizes of one block's parameters on one tensor rank: columns or rows of every product are
        shared out, norm weights are whole.
        """
        ranks = self.tensor_ranks
        q, kv = self.heads * self.head_dim // ranks, self.kv_heads * self.head_dim // ranks
        ffn = self.ffn // ranks
        return [
            (self.hidden,),
            (q, self.hidden),
            (2 * kv, self.hidden),
            (self.hidden, q),
            (self.hidden,),
            (ffn, 2, self.hidden),
            (self.hidden, ffn),
        ]

    @property
    def block_parameters(self) -> int:
        """Elements of `block_weights`."""
        return sum(math.prod(size) for size in self.block_weights)


def shape(name: str) -> Shape:
    """A model's, by its name in `MODELS`."""
    model = yaml.safe_load((FOLDER / f"{MODELS[name]}.yaml").read_text())
    return Shape(
        name=name,
        tokens=8192,
        hidden=model["hidden"],
        heads=model["heads"],
        kv_heads=model["kv_heads"],
        head_dim=model["head_dim"],
        ffn=model["ffn"],
        vocab=model["vocab"],
        norm_eps=model["norm_eps"],
        rope_theta=model["rope_theta"],
        tensor_ranks=TENSOR_RANKS.get(name, 1),
    )


def tiny(name: str) -> Shape:
    """What stands in for a model in a dry run."""
    return Shape(name, 16, 64, 4, 2, 16, 96, 160, 1e-5, 500_000.0)
