"""Gives a sharded model on the meta device its memory and its initial weights."""

import torch
from megallama_kernels.adamw import split
from torch import Tensor
from torch.distributed.tensor import DTensor

from megallama.config.schema import ModelConfig
from megallama.mesh import Axis, ProcessGroupManager
from megallama.model.init import initial_rows
from megallama.model.llama import Llama
from megallama.parallel.placements import placement, shard_range


@torch.no_grad()
def materialize(
    stage: Llama,
    config: ModelConfig,
    groups: ProcessGroupManager,
    seed: int,
    device: torch.device,
    *,
    split_masters: bool = False,
) -> dict[str, Tensor] | None:
    """Allocate a stage's shards on the device and fill them; each rank draws just what it holds.

    Returns:
        With split masters, whose high halves the parameters are, the low halves by global name.

    """
    low: dict[str, Tensor] | None = {} if split_masters else None
    stage.to_empty(device=device)
    sharding = _sharding_axis(groups)
    for name, parameter in stage.named_parameters():
        assert isinstance(parameter, DTensor)
        rows, columns = held_region(name, parameter.shape, config, groups.tensor, sharding)
        drawn = initial_rows(name, parameter.shape, rows, config, seed)
        if columns is not None:
            drawn = drawn[:, columns.start : columns.stop]
        if low is not None:
            drawn, low[name] = split(drawn.to(device))
        parameter.to_local().copy_(drawn)
    return low


def held_region(
    name: str, shape: torch.Size, config: ModelConfig, tensor: Axis, sharding: tuple[int, int]
) -> tuple[range, range | None]:
    """Rows, and columns if not all, of a whole parameter that one rank holds.

    Tensor parallelism cuts first; FSDP cuts the rows of what it leaves.

    Args:
        name: global name of the parameter.
        shape: of the whole parameter.
        config: shape of the model.
        tensor: this rank's place on the tensor axis.
        sharding: (rank, size) among the ranks FSDP shards over.

    """
    dim = placement(name, kv_heads=config.kv_heads, tensor=tensor.size).shard_dim
    rows = shard_range(shape[0], tensor.rank, tensor.size) if dim == 0 else range(shape[0])
    columns = shard_range(shape[1], tensor.rank, tensor.size) if dim == 1 else None
    piece = shard_range(len(rows), *sharding)
    return rows[piece.start : piece.stop], columns


def _sharding_axis(groups: ProcessGroupManager) -> tuple[int, int]:
    innermost = groups.fsdp_mesh.ndim - 1
    return groups.fsdp_mesh.get_local_rank(innermost), groups.fsdp_mesh.size(innermost)
