"""Initial weights depend on the seed and the name, not on who draws which rows."""

import math
from itertools import pairwise
from unittest import mock

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megallama.config import shipped
from megallama.config.schema import ModelConfig, parameter_count, vocab_rows
from megallama.model import init
from megallama.model.init import initial_rows, initialize
from megallama.model.llama import Llama, Part
from tests.model.small import small_config

PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3.1_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3.1_70b": 70_553_706_496,
    "llama3.1_405b": 405_853_388_800,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
}
NAMES = ["embed.weight", "head.weight", "layers.0.wq", "layers.1.wq", "layers.1.wo", "head.norm"]


def whole(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int = 1) -> torch.Tensor:
    return initial_rows(name, torch.Size(shape), range(shape[0]), config, seed)


@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 400),
    rest=st.sampled_from([(8,), (3, 4), (1,)]),
    block_elements=st.integers(1, 1000),
    cuts=st.lists(st.integers(0, 400), max_size=5),
)
def test_parts_are_parts_of_the_whole(
    name: str, rows: int, rest: tuple[int, ...], block_elements: int, cuts: list[int]
):
    config = small_config()
    shape = torch.Size((rows, *rest))
    borders = sorted({0, rows, *(min(cut, rows) for cut in cuts)})
    parts = [range(a, b) for a, b in pairwise(borders)]
    with mock.patch.object(init, "BLOCK_ELEMENTS", block_elements):
        drawn = [initial_rows(name, shape, part, config, 7) for part in parts]
        assert [d.shape for d in drawn] == [(len(part), *rest) for part in parts]
        assert torch.equal(torch.cat(drawn), initial_rows(name, shape, range(rows), config, 7))


@given(rows=st.integers(1, 300), at=st.integers(0, 300))
def test_no_rows_are_no_numbers(rows: int, at: int):
    at = min(at, rows)
    drawn = initial_rows("layers.0.wq", torch.Size((rows, 8)), range(at, at), small_config(), 1)
    assert drawn.shape == (0, 8)


def test_parts_across_blocks_of_real_size():
    shape = torch.Size((2100, 1024))
    assert shape.numel() > 2 * init.BLOCK_ELEMENTS
    config = small_config()
    everything = initial_rows("layers.0.wq", shape, range(2100), config, 1)
    part = range(1000, 2060)
    assert torch.equal(
        initial_rows("layers.0.wq", shape, part, config, 1), everything[part.start : part.stop]
    )
    assert len({tuple(row) for row in everything[:, :4].tolist()}) == 2100, "blocks repeat"


def test_every_name_seed_and_block_has_numbers_of_its_own():
    config = small_config()
    names = ["layers.0.wq", "layers.1.wq", "layers.11.wq", "layers.1.wkv"]
    with mock.patch.object(init, "BLOCK_ELEMENTS", 64):
        drawn = [whole(name, (16, 8), config, seed) for name in names for seed in (0, 1, 2**62)]
    blocks = torch.cat([d.flatten().split(64)[k][None] for d in drawn for k in (0, 1)])
    normalised = blocks / blocks.norm(dim=1, keepdim=True)
    alike = (normalised @ normalised.T - torch.eye(len(blocks))).abs().max()
    assert alike < 0.65, "two blocks are correlated"


@pytest.mark.parametrize(
    ("leaf", "std"),
    [
        ("wq", 0.02),
        ("wkv", 0.02),
        ("w13", 0.02),
        ("wo", 0.02 / math.sqrt(2 * 16)),
        ("w2", 0.02 / math.sqrt(2 * 16)),
    ],
)
def test_deviation(leaf: str, std: float):
    config = small_config(layers=16)
    drawn = whole(f"layers.3.{leaf}", (1000, 200), config)
    assert drawn.dtype == torch.float32
    assert drawn.std().item() == pytest.approx(std, rel=0.01)
    assert abs(drawn.mean().item()) < 4 * std / math.sqrt(drawn.numel())
    beyond = (drawn.abs() > 2 * std).float().mean().item()
    assert beyond == pytest.approx(math.erfc(math.sqrt(2)), rel=0.1), "not normal"


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_padded_rows_are_zero_and_real_ones_are_not(name: str):
    config = small_config(vocab=200)
    shape = torch.Size((vocab_rows(config), 32))
    drawn = initial_rows(name, shape, range(shape[0]), config, 1)
    assert drawn[200:].eq(0).all()
    assert drawn[:200].ne(0).all()
    assert drawn[:200].std().item() == pytest.approx(0.02, rel=0.05)
    only_padding = initial_rows(name, shape, range(220, 256), config, 1)
    assert only_padding.shape == (36, 32)
    assert only_padding.eq(0).all()


def test_norm_weights_are_one():
    config = small_config()
    model = Llama(config)
    initialize(model, config, 1)
    norms = [p for p in model.parameters() if p.ndim == 1]
    assert len(norms) == 2 * config.layers + 1
    assert all(norm.eq(1).all() for norm in norms)


def test_padding_of_the_vocabulary_changes_no_other_number():
    """So that a vocabulary's real rows start alike whatever the padding rule."""
    config = small_config(vocab=200)
    short = initial_rows("embed.weight", torch.Size((256, 32)), range(200), config, 1)
    long = initial_rows("embed.weight", torch.Size((256, 32)), range(256), config, 1)
    assert torch.equal(short, long[:200])


def test_a_float64_model_starts_from_the_same_numbers():
    config = small_config()
    narrow, wide = Llama(config), Llama(config).double()
    initialize(narrow, config, 3)
    initialize(wide, config, 3)
    for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert b.dtype == torch.float64
        assert torch.equal(a.double(), b), name


def test_a_stage_starts_from_the_numbers_of_the_whole_model():
    config = small_config(layers=4)
    model = Llama(config)
    initialize(model, config, 3)
    everything = dict(model.named_parameters())
    stage = Llama(config, parts=[Part(range(2, 4), first=False)])
    initialize(stage, config, 3)
    names = [name for name, _ in stage.named_parameters()]
    assert {"layers.2.wq", "layers.3.w2", "head.norm", "head.weight"} <= set(names)
    assert not any(name.startswith(("embed", "layers.0", "layers.1")) for name in names)
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, everything[name]), name


def counted(config: ModelConfig) -> int:
    """Elements of the model itself, less its padded vocabulary rows."""
    with torch.device("meta"):
        model = Llama(config)
    padded = {"embed.weight", "head.weight"}
    return sum(
        p.numel() - ((p.shape[0] - config.vocab) * p.shape[1] if name in padded else 0)
        for name, p in model.named_parameters()
    )


@given(
    hidden=st.integers(1, 9),
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 4).map(lambda n: 2 * n),
    ffn=st.integers(1, 20),
    vocab=st.integers(1, 400),
    tied=st.booleans(),
)
def test_parameter_count_is_what_the_model_holds(
    hidden: int,
    layers: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    tied: bool,
):
    config = ModelConfig(
        hidden=hidden,
        layers=layers,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        tie_embeddings=tied,
    )
    assert counted(config) == parameter_count(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_as_many_parameters_as_published(name: str):
    config = ModelConfig(**yaml.safe_load(shipped.text("models", name)))
    assert counted(config) == PUBLISHED[name]
