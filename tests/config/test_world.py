"""Layouts and the number of processes: what is filled in, what is refused, what a start needs."""

import pytest

from megallama.config.errors import UserError
from megallama.config.load import load_config
from megallama.config.rules import required_processes, resolve_world
from megallama.config.schema import frees_weights
from tests.config.sample import load


@pytest.mark.parametrize(
    ("layout", "world", "shard"),
    [
        ("layout.data_shard=-1", 1, 1),
        ("layout.data_shard=-1", 8, 8),
        ("layout.data_shard=-1 layout.tensor=2 layout.pipeline=2", 8, 2),
        ("layout.data_shard=2 layout.data_replicate=2 layout.context=2", 8, 2),
    ],
)
def test_world_fills_data_shard(layout: str, world: int, shard: int) -> None:
    resolved = resolve_world(load(*layout.split()), world)
    assert resolved.layout.data_shard == shard
    assert resolve_world(resolved, world) == resolved


@pytest.mark.parametrize(
    ("layout", "world", "says"),
    [
        (
            "layout.data_shard=-1 layout.tensor=2 layout.pipeline=2",
            6,
            "layout: tensor 2 × context 1 × pipeline 2 × data_replicate 1 = 4 ranks do not divide "
            "a world of 6 processes: start 4 or 8",
        ),
        (
            "layout.data_shard=-1 layout.tensor=4",
            1,
            "= 4 ranks do not divide a world of 1 processes: start 4",
        ),
        (
            "layout.data_shard=2 layout.tensor=2",
            8,
            "data_shard 2 = 4 ranks, not 8 processes: start 4, or use data_shard 4",
        ),
        ("layout.data_shard=2 layout.tensor=2", 5, "= 4 ranks, not 5 processes: start 4"),
        (
            "layout.data_shard=-1",
            3,
            "1536 is not a multiple of data.seq_len 192 × layout.data_shard 3 = 576: "
            "use 1152 or 1728",
        ),
    ],
)
def test_world_that_does_not_fit(layout: str, world: int, says: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_world(load(*layout.split()), world)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "devices", "processes"),
    [
        ("layout.data_shard=-1", 0, 1),
        ("layout.data_shard=-1", 8, 8),
        ("layout.data_shard=-1 layout.tensor=2 layout.pipeline=2", 0, 4),
        ("layout.data_shard=-1 layout.tensor=2 layout.pipeline=2", 2, 4),
        ("layout.data_shard=-1 layout.tensor=2 layout.pipeline=2", 11, 8),
        ("layout.data_shard=4 layout.tensor=2", 0, 8),
        ("layout.data_shard=4 layout.tensor=2", 64, 8),
    ],
)
def test_processes_for_a_start_alone(layout: str, devices: int, processes: int) -> None:
    config = load(*layout.split())
    assert required_processes(config, devices) == processes
    assert resolve_world(config, processes).layout.data_shard > 0


@pytest.mark.parametrize(
    ("changes", "freed"),
    [
        ("", True),  # 8.0e9 parameters, 6 bytes each
        ("model=llama3.2_1b", False),  # 1.24e9
        ("model=llama3.2_1b train.precision=fp32", True),
        ("layout.tensor=8 layout.data_shard=1 layout.context=2", False),  # 1.0e9 a tensor rank
        ("layout.pipeline=2 layout.data_shard=4", False),
        ("layout.data_shard=1 layout.data_replicate=8", False),
        ("layout.pipeline=2 layout.data_shard=4 layout.reshard_after_forward=true", True),
        ("layout.reshard_after_forward=false", False),
    ],
)
def test_weights_are_freed_where_they_are_large(changes: str, freed: bool) -> None:
    config = load_config("llama3.1_8b_8gpu", changes.split())
    assert frees_weights(resolve_world(config, 8 if "context" not in changes else 16)) is freed
