"""Layers to stages."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.parallel.pipeline.split import EMBEDDING_COST, end_costs, given_split, split_layers

LLAMA_3_8B = {"hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336}
LLAMA_3_405B = {"hidden": 16384, "heads": 128, "kv_heads": 8, "head_dim": 128, "ffn": 53248}
TEXT = {"vocab": 128_256, "seq_len": 8192}

fitting = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
eighths = st.integers(0, 40).map(lambda n: n / 8)  # sums of them are exact


def sizes(ranges: list[range]) -> list[int]:
    assert [layer for held in ranges for layer in held] == list(range(sum(map(len, ranges))))
    return [len(held) for held in ranges]


def costs(counts: list[int], first: float, last: float) -> list[float]:
    out = [float(count) for count in counts]
    out[0] += first
    out[-1] += last
    return out


@given(fitting, eighths, eighths)
def test_stages_hold_all_layers_in_order_and_each_has_one(
    fit: tuple[int, int], first: float, last: float
):
    layers, stages = fit
    held = sizes(split_layers(layers, stages, first_cost=first, last_cost=last))
    assert (len(held), sum(held)) == (stages, layers)
    assert min(held) >= 1


@given(fitting, eighths, eighths)
def test_no_layer_moved_makes_the_step_cheaper(fit: tuple[int, int], first: float, last: float):
    """Along a chain of stages, too: moving one layer over each border moves one from end to end."""
    layers, stages = fit
    held = sizes(split_layers(layers, stages, first_cost=first, last_cost=last))
    cost = costs(held, first, last)
    givers = [c for count, c in zip(held, cost, strict=True) if count > 1]
    assert max(givers, default=0.0) <= min(cost) + 1


@given(st.integers(1, 8), st.integers(1, 5), eighths, eighths)
def test_the_best_of_all_splits(layers: int, stages: int, first: float, last: float):
    """Least maximum, then least sum of squares, then the fewest layers on the earliest stages."""
    choices = map(list, product(range(1, layers + 1), repeat=stages))
    every = [split for split in choices if sum(split) == layers]
    if not every:
        return
    best = min(every, key=lambda s: (max(cost := costs(s, first, last)), squares(cost), s))
    assert sizes(split_layers(layers, stages, first_cost=first, last_cost=last)) == best


def squares(values: list[float]) -> float:
    return sum(value * value for value in values)


@pytest.mark.parametrize("stages", [16, 64])
def test_llama_3_405b_has_one_layer_fewer_on_the_first_and_on_the_last_stage(stages: int):
    """Section 3.3.2 of the paper: 126 layers, for 16 ranks."""
    first, last = end_costs(**LLAMA_3_405B, **TEXT)
    most = 128 // stages
    held = sizes(split_layers(126, stages, first_cost=first, last_cost=last))
    assert held == [most - 1, *[most] * (stages - 2), most - 1]


def test_llama_3_405b_on_128_stages_leaves_the_ends_to_embedding_and_head():
    first, last = end_costs(**LLAMA_3_405B, **TEXT)
    held = sizes(split_layers(126, 128, first_cost=first, last_cost=last))
    assert held == [0, *[1] * 126, 0]


def test_costs_of_the_ends():
    """Llama 3 405B, weights of a block: q and o 16384², k and v 16384·1024, ffn 3·16384·53248."""
    weights = 2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248
    block = 2 * weights + 2 * 2 * 16384 * 8192 / 2  # scores and values, half of 8192 keys
    head = 2 * 16384 * 128_256
    embedding, cost = end_costs(**LLAMA_3_405B, **TEXT)
    assert cost == pytest.approx(head / block)
    assert 0.6 < cost < 0.65
    assert embedding == EMBEDDING_COST
    assert 2.0 < end_costs(**LLAMA_3_8B, **TEXT)[1] < 2.2, "a small model's head is two blocks"


def test_the_head_of_a_small_model_takes_the_place_of_layers():
    first, last = end_costs(**LLAMA_3_8B, **TEXT)
    held = sizes(split_layers(32, 8, first_cost=first, last_cost=last))
    assert held == [4, 4, 4, 4, 4, 5, 5, 2]


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [(4, 4, [1] * 4), (5, 4, [1, 1, 1, 2]), (7, 4, [1, 2, 2, 2]), (9, 1, [9]), (3, 2, [1, 2])],
)
def test_later_stages_hold_more_where_nothing_else_tells(
    layers: int, stages: int, expected: list[int]
):
    assert sizes(split_layers(layers, stages)) == expected


@given(layers=st.integers(1, 50), more=st.integers(1, 50))
def test_more_stages_than_layers(layers: int, more: int):
    with pytest.raises(ValueError, match=f"{layers + more} pipeline stages for {layers} layers"):
        split_layers(layers, layers + more)
    with pytest.raises(ValueError, match=f"{layers + more + 2} pipeline stages"):
        split_layers(layers, layers + more + 2, first_cost=0.1, last_cost=0.1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_sizes_that_are_given(counts: list[int]):
    assert sizes(given_split(counts, sum(counts))) == counts


def test_given_ends_may_be_empty_and_nothing_else():
    assert sizes(given_split([0, 2, 2, 0], 4)) == [0, 2, 2, 0]
    for counts in ([1, 0, 3], [2, -1, 3], [-1, 5]):
        with pytest.raises(ValueError, match="only the first and the last may have 0"):
            given_split(counts, 4)
    with pytest.raises(ValueError, match=r"stages of \[1, 2\] layers hold 3, the model has 4"):
        given_split([1, 2], 4)
