"""Who is who in a mesh of 8, and who talks to whom."""

import os
from typing import Any

import pytest
import torch.distributed as dist

from megallama.config.schema import LayoutConfig
from megallama.mesh import Axis, build_process_groups, coordinates_of, coordinates_text
from tests.ranks import ranks

FASTEST_FIRST = ("tensor", "context", "pipeline", "data_shard", "data_replicate")
layouts = pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 2, "pipeline": 2, "data_shard": 2},
        {"tensor": 2, "data_shard": 2, "data_replicate": 2},
        {"pipeline": 4, "data_replicate": 2, "data_shard": 1},
        {"tensor": 2, "context": 2, "data_shard": 2},
        {"context": 2, "data_shard": 2, "data_replicate": 2},
        {"context": 2, "data_shard": 1, "data_replicate": 4},
        {"tensor": 8, "data_shard": 1},
        {"data_shard": 8},
    ],
    ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()),
)


def place_of(rank: int, layout: LayoutConfig) -> dict[str, int]:
    """By counting up through all places, tensor fastest."""
    place = dict.fromkeys(FASTEST_FIRST, 0)
    for _ in range(rank):
        for name in FASTEST_FIRST:
            place[name] += 1
            if place[name] < getattr(layout, name):
                break
            place[name] = 0
    return place


def peers(rank: int, layout: LayoutConfig, *axes: str) -> list[int]:
    """The ranks whose places differ from this rank's on these axes alone."""
    mine = place_of(rank, layout)
    fixed = [name for name in FASTEST_FIRST if name not in axes]
    places = {other: place_of(other, layout) for other in range(8)}
    return [o for o, place in places.items() if all(place[n] == mine[n] for n in fixed)]


@layouts
def test_coordinates_without_a_process_group(sizes: dict[str, Any]):
    layout = LayoutConfig(**sizes)
    for rank in range(8):
        found = coordinates_of(rank, layout)
        assert tuple(found) == FASTEST_FIRST
        assert {name: place for name, (place, _) in found.items()} == place_of(rank, layout)
        assert {n: size for n, (_, size) in found.items()} == {
            n: getattr(layout, n) for n in FASTEST_FIRST
        }


def test_neighbours_in_rank_are_tensor_peers():
    layout = LayoutConfig(tensor=2, pipeline=2, data_shard=2)
    assert [coordinates_of(rank, layout)["tensor"][0] for rank in range(8)] == [0, 1] * 4
    assert [coordinates_of(r, layout)["pipeline"][0] for r in range(8)] == [0, 0, 1, 1] * 2
    assert [coordinates_of(r, layout)["data_shard"][0] for r in range(8)] == [0] * 4 + [1] * 4


def test_coordinates_for_people():
    layout = LayoutConfig(tensor=2, pipeline=2, data_shard=2)
    text = coordinates_text(coordinates_of(6, layout))
    assert text == "tensor 0 · pipeline 1 · data_shard 1"
    assert coordinates_text(coordinates_of(0, LayoutConfig(data_shard=1))) == "the only rank"


@layouts
@ranks(8)
def test_groups(sizes: dict[str, Any]):
    layout, rank = LayoutConfig(**sizes), dist.get_rank()
    assert rank == int(os.environ["RANK"])
    groups = build_process_groups(layout, "cpu")
    places = coordinates_of(rank, layout)

    def check(axis: Axis, *names: str) -> None:
        members = dist.get_process_group_ranks(axis.group)
        assert members == peers(rank, layout, *names), names
        assert members[axis.rank] == rank
        assert axis.size == len(members) == axis.group.size()

    for name in FASTEST_FIRST:
        axis = getattr(groups, name)
        check(axis, name)
        assert (axis.rank, axis.size) == places[name]
    check(groups.data, "data_shard", "data_replicate")
    assert groups.tensor_mesh.mesh.tolist() == peers(rank, layout, "tensor")

    gradients = groups.pipeline_gradients
    assert dist.get_process_group_ranks(gradients) == peers(rank, layout, "pipeline")
    assert gradients.group_name != groups.pipeline.group.group_name, (
        "one channel for both directions"
    )

    sharding = groups.fsdp_mesh
    innermost = dist.get_process_group_ranks(sharding.get_group(sharding.ndim - 1))
    assert innermost == peers(rank, layout, "data_shard", "context")
    assert sharding.ndim == (2 if layout.data_replicate > 1 else 1)
    if sharding.ndim == 2:
        copies = dist.get_process_group_ranks(sharding.get_group(0))
        assert copies == peers(rank, layout, "data_replicate")


@ranks(8)
def test_first_and_last_of_a_pipeline_share_a_tied_weight():
    layout, rank = LayoutConfig(pipeline=4, tensor=2, data_shard=1), dist.get_rank()
    tied = build_process_groups(layout, "cpu", tie_embeddings=True).tied_embedding
    place = coordinates_of(rank, layout)["pipeline"][0]
    if place in (0, 3):
        line = peers(rank, layout, "pipeline")
        assert tied is not None
        assert dist.get_process_group_ranks(tied) == [line[0], line[-1]]
    else:
        assert tied is None
    assert build_process_groups(layout, "cpu").tied_embedding is None
