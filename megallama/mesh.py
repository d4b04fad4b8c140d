"""From the world to a device mesh: who this rank is on every axis, and the groups it talks in."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megallama.config.schema import LayoutConfig

AXES = ("data_replicate", "data_shard", "pipeline", "context", "tensor")
"""Slowest to fastest: neighbours in rank are tensor-parallel peers (Llama 3, section 3.3.2)."""


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis of the mesh."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class ProcessGroupManager:
    """Every process group a training step uses, and this rank's coordinates."""

    mesh: DeviceMesh
    tensor: Axis
    context: Axis
    pipeline: Axis
    data_shard: Axis
    data_replicate: Axis
    data: Axis
    """data_replicate x data_shard: the ranks that read different samples."""
    fsdp_mesh: DeviceMesh
    """Parameters are sharded over its last dimension, and copied over its first if it has two."""
    pipeline_gradients: dist.ProcessGroup
    """A second group over the pipeline's ranks: gradients travel against activations, and sharing
    one ordered channel could deadlock."""
    pipeline_wrap: dist.ProcessGroup
    """For activations from the last rank to rank 0, under virtual stages: over two ranks these two
    would share a channel with those from rank 0 to the last."""
    pipeline_wrap_gradients: dist.ProcessGroup
    """For gradients from rank 0 to the last, likewise."""
    tied_embedding: dist.ProcessGroup | None
    """The pipeline's first and last rank, on those, if both hold the one weight of embedding and
    head."""

    @property
    def tensor_mesh(self) -> DeviceMesh:
        """The 1-D mesh of this rank's tensor-parallel peers."""
        return self.mesh["tensor"]


def axis_sizes(layout: LayoutConfig) -> dict[str, int]:
    """Ranks on each axis, slowest first; `data_shard` must be resolved."""
    return {name: getattr(layout, name) for name in AXES}


def coordinates_of(rank: int, layout: LayoutConfig) -> dict[str, tuple[int, int]]:
    """`{axis: (place, size)}` of a global rank, fastest axis first; needs no process group."""
    places = {}
    for name, size in reversed(axis_sizes(layout).items()):
        places[name] = (rank % size, size)
        rank //= size
    return places


def coordinates_text(places: dict[str, tuple[int, int]]) -> str:
    """Coordinates for people; axes of one rank are left out."""
    named = [f"{name} {rank}" for name, (rank, size) in places.items() if size > 1]
    return " · ".join(named) or "the only rank"


def build_process_groups(
    layout: LayoutConfig, device_type: str, *, tie_embeddings: bool = False
) -> ProcessGroupManager:
    """Create the mesh and its groups; torch.distributed must be initialised.

    Args:
        layout: with `data_shard` resolved; its product is the world size.
        device_type: `cuda` or `cpu`.
        tie_embeddings: of the model.

    """
    sizes = axis_sizes(layout)
    mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=AXES)
    sharding = mesh["data_shard", "context"]._flatten("fsdp")
    data = mesh["data_replicate", "data_shard"]._flatten("data")
    replicated = layout.data_replicate > 1
    virtual = layout.virtual_stages > 1
    channels = [_group_of(_pipelines(mesh)) for _ in range(3 if virtual else 1)]
    gradients, wrap, wrap_gradients = (channels * 3)[:3]
    assert gradients and wrap and wrap_gradients, "every rank is in a pipeline"
    copies = mesh["data_replicate"]
    shared = tie_embeddings and layout.pipeline > 1
    return ProcessGroupManager(
        mesh=mesh,
        **{name: _axis(mesh[name]) for name in AXES},
        data=_axis(data),
        fsdp_mesh=DeviceMesh._concatenate([copies, sharding]) if replicated else sharding,
        pipeline_gradients=gradients,
        pipeline_wrap=wrap,
        pipeline_wrap_gradients=wrap_gradients,
        tied_embedding=_group_of(_pipelines(mesh, ends=True)) if shared else None,
    )


def _axis(mesh: DeviceMesh) -> Axis:
    return Axis(size=mesh.size(), rank=mesh.get_local_rank(), group=mesh.get_group())


def _pipelines(mesh: DeviceMesh, *, ends: bool = False) -> list[list[int]]:
    """The ranks of every pipeline, or just the first and the last of each."""
    pipeline_dim = AXES.index("pipeline")
    lines = mesh.mesh.movedim(pipeline_dim, -1).reshape(-1, mesh.size(pipeline_dim)).tolist()
    return [[line[0], line[-1]] for line in lines] if ends else lines


def _group_of(members: list[list[int]]) -> dist.ProcessGroup | None:
    """A group for each list of ranks; the one this rank is in. Called by all ranks alike."""
    groups = [dist.new_group(ranks) for ranks in members]
    rank = dist.get_rank()
    mine = [group for ranks, group in zip(members, groups, strict=True) if rank in ranks]
    return mine[0] if mine else None
