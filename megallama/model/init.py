"""Initial weights that depend on the seed and the parameter's name, and on nothing else.

A parameter is drawn in fixed blocks of rows, each from its own generator, so that a rank draws just
the blocks it holds a part of, and every layout starts from the same numbers.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from megallama.config.schema import ModelConfig

STD = 0.02
BLOCK_ELEMENTS = 1 << 20

_RESIDUAL_OUTPUTS = ("wo", "w2")
_NORMS = ("attn_norm", "ffn_norm", "norm")
_VOCABULARY = ("embed.weight", "head.weight")


def initial_rows(
    name: str, shape: torch.Size, rows: range, config: ModelConfig, seed: int
) -> Tensor:
    """Rows of a parameter's initial value, float32 on CPU, `[len(rows), *shape[1:]]`.

    Norm weights are 1. Matrices are normal with deviation 0.02, and 0.02/sqrt(2·layers) where they
    write to the residual stream (Radford et al. 2019, section 2.3). Padded vocabulary rows are 0.

    Args:
        name: global name, such as `layers.3.wq`.
        shape: of the whole parameter.
        rows: which rows are wanted.
        config: shape of the model.
        seed: of the run.

    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _NORMS:
        return torch.ones(len(rows), *shape[1:])
    std = STD / math.sqrt(2 * config.layers) if leaf in _RESIDUAL_OUTPUTS else STD
    block_rows = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    out = torch.empty(len(rows), *shape[1:])
    for block in range(rows.start // block_rows, -(-rows.stop // block_rows)):
        start, stop = block * block_rows, min(shape[0], (block + 1) * block_rows)
        drawn = torch.empty(stop - start, *shape[1:])
        drawn.normal_(std=std, generator=_generator(seed, name, block))
        first, last = max(start, rows.start), min(stop, rows.stop)
        out[first - rows.start : last - rows.start] = drawn[first - start : last - start]
    if name in _VOCABULARY:
        out[max(0, config.vocab - rows.start) :] = 0
    return out


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of an unsharded model."""
    for name, parameter in module.named_parameters():
        rows = range(parameter.shape[0])
        parameter.copy_(initial_rows(name, parameter.shape, rows, config, seed))
