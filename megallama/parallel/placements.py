"""Which axis shards, replicates or sums each parameter. Data: standard library only.

Gradient reduction, initial weights, grad norm and the planner all derive from this one table. FSDP
shards dimension 0 of whatever tensor parallelism leaves.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """How tensor parallelism lays out one parameter."""

    shard_dim: int | None
    """The dimension that is cut over tensor ranks; None: every rank holds the whole parameter, and
    its gradient is the sum over the ranks, each of which saw other tokens or heads."""
    heads_per_rank: tuple[int, int] | None = None
    """For replicated key/value weights: (kv_heads, tensor) when tensor > kv_heads. Each rank
    computes with the one head that its query heads attend to."""


_SHARD_DIM: dict[str, int | None] = {
    "embed.weight": 0,
    "attn_norm": None,
    "wq": 0,
    "wkv": 0,
    "wo": 1,
    "ffn_norm": None,
    "w13": 0,
    "w2": 1,
    "head.norm": None,
    "head.weight": 0,
}


_LAYER = re.compile(r"^layers\.\d+\.(?!.*\.)")


def table_name(name: str) -> str:
    """The name in this table of a parameter's global name: `layers.3.wq` is `wq`."""
    return _LAYER.sub("", name)


def placement(name: str, *, kv_heads: int, tensor: int) -> Placement:
    """How `tensor` ranks hold a parameter.

    Args:
        name: global or table name.
        kv_heads: of the whole model.
        tensor: tensor-parallel ranks.

    Raises:
        KeyError: the name is not a parameter of the model.

    """
    key = table_name(name)
    if key == "wkv" and kv_heads < tensor:
        return Placement(shard_dim=None, heads_per_rank=(kv_heads, tensor))
    return Placement(shard_dim=_SHARD_DIM[key])


def shard_range(length: int, rank: int, size: int) -> range:
    """Rows of `length` that rank `rank` of `size` holds: pieces of ceil(length/size), the last
    ones shorter or empty (torch.chunk, FSDP2 and DTensor agree on it).
    """
    piece = -(-length // size)
    return range(min(length, rank * piece), min(length, (rank + 1) * piece))
