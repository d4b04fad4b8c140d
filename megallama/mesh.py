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


def build_process_groups(layout: LayoutConfig, device_type: str) -> ProcessGroupManager:
    """Create the mesh and its groups; torch.distributed must be initialised.

    Args:
        layout: with `data_shard` resolved; its product is the world size.
        device_type: `cuda` or `cpu`.

    """
    sizes = axis_sizes(layout)
    mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=AXES)
    sharding = mesh["data_shard", "context"]._flatten("fsdp")
    data = mesh["data_replicate", "data_shard"]._flatten("data")
    replicated = layout.data_replicate > 1
    copies = mesh["data_replicate"]
    return ProcessGroupManager(
        mesh=mesh,
        **{name: _axis(mesh[name]) for name in AXES},
        data=_axis(data),
        fsdp_mesh=DeviceMesh._concatenate([copies, sharding]) if replicated else sharding,
        pipeline_gradients=_second_pipeline_group(mesh),
    )


def _axis(mesh: DeviceMesh) -> Axis:
    return Axis(size=mesh.size(), rank=mesh.get_local_rank(), group=mesh.get_group())


def _second_pipeline_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    pipeline_dim = AXES.index("pipeline")
    members = mesh.mesh.movedim(pipeline_dim, -1).reshape(-1, mesh.size(pipeline_dim)).tolist()
    group, _ = dist.new_subgroups_by_enumeration(members)
    assert group is not None, "every rank is on the pipeline axis"
    return group
