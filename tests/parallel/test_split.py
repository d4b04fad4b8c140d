"""Layers to stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.parallel.pipeline.split import split_layers

fitting = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(fitting)
def test_stages_hold_all_layers_in_order_and_as_evenly_as_can_be(fit: tuple[int, int]):
    layers, stages = fit
    ranges = split_layers(layers, stages)
    assert len(ranges) == stages
    assert [layer for held in ranges for layer in held] == list(range(layers))
    sizes = [len(held) for held in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@given(fitting)
def test_the_ends_are_the_short_ones(fit: tuple[int, int]):
    """The head costs most, then the embedding: sizes grow from both ends to the middle."""
    layers, stages = fit
    sizes = [len(held) for held in split_layers(layers, stages)]
    short = [stage for stage, size in enumerate(sizes) if size < max(sizes)]
    from_the_front = [stage for stage in short if stage < stages - 1 - stage]
    from_the_back = [stages - 1 - stage for stage in short if stage >= stages - 1 - stage]
    assert sorted(from_the_front) == list(range(len(from_the_front)))
    assert sorted(from_the_back) == list(range(len(from_the_back)))
    assert len(from_the_back) - len(from_the_front) in (0, 1), (
        "the last stage gives up a layer first"
    )


def test_llama_3_405b():
    sizes = [len(held) for held in split_layers(126, 16)]
    assert sizes == [7, *[8] * 14, 7]


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [(4, 4, [1] * 4), (5, 4, [1, 2, 1, 1]), (7, 4, [2, 2, 2, 1]), (9, 1, [9]), (3, 2, [2, 1])],
)
def test_small_models(layers: int, stages: int, sizes: list[int]):
    assert [len(held) for held in split_layers(layers, stages)] == sizes


@given(layers=st.integers(1, 50), more=st.integers(1, 50))
def test_more_stages_than_layers(layers: int, more: int):
    with pytest.raises(ValueError, match=f"{layers + more} pipeline stages for {layers} layers"):
        split_layers(layers, layers + more)
