"""The placement table covers the model and nothing else, and needs no torch."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megallama.model.llama import Llama
from megallama.parallel.placements import Placement, placement, shard_range, table_name
from tests.model.small import small_config

COLUMNS = {"wo", "w2"}
REPLICATED = {"attn_norm", "ffn_norm", "head.norm"}


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_a_placement_that_cuts_it_evenly(tensor: int, tied: bool):
    config = small_config(layers=12, tie_embeddings=tied)
    with torch.device("meta"):
        model = Llama(config)
    seen = set()
    for name, parameter in model.named_parameters():
        layout = placement(name, kv_heads=config.kv_heads, tensor=tensor)
        leaf = table_name(name)
        seen.add(leaf)
        assert layout == placement(leaf, kv_heads=config.kv_heads, tensor=tensor)
        if leaf == "wkv" and tensor > config.kv_heads:
            assert layout == Placement(shard_dim=None, heads_per_rank=(config.kv_heads, tensor))
            continue
        expected = None if leaf in REPLICATED else 1 if leaf in COLUMNS else 0
        assert layout == Placement(shard_dim=expected)
        if layout.shard_dim is not None:
            assert parameter.shape[layout.shard_dim] % tensor == 0
    table = {"embed.weight", "attn_norm", "wq", "wkv", "wo", "ffn_norm", "w13", "w2"}
    assert seen == table | {"head.norm"} | ({"head.weight"} if not tied else set())


@pytest.mark.parametrize(
    "name", ["wk", "layers.0.wk", "layers.0.norm", "norm", "head", "embed", "layers.3.wkv.bias", ""]
)
@pytest.mark.parametrize("tensor", [1, 8])
def test_other_names_are_errors(name: str, tensor: int):
    with pytest.raises(KeyError):
        placement(name, kv_heads=2, tensor=tensor)


@pytest.mark.parametrize(("name", "key"), [("layers.3.wq", "wq"), ("layers.125.w2", "w2")])
def test_layers_share_a_row_of_the_table(name: str, key: str):
    assert table_name(name) == key


@given(kv_heads=st.integers(1, 16), tensor=st.integers(1, 64))
def test_key_value_weights_are_replicated_only_for_want_of_heads(kv_heads: int, tensor: int):
    layout = placement("layers.0.wkv", kv_heads=kv_heads, tensor=tensor)
    if tensor > kv_heads:
        assert layout == Placement(shard_dim=None, heads_per_rank=(kv_heads, tensor))
    else:
        assert layout == Placement(shard_dim=0)


@given(length=st.integers(1, 300), size=st.integers(1, 40))
def test_pieces_are_those_of_torch_chunk(length: int, size: int):
    chunks = [chunk.tolist() for chunk in torch.arange(length).chunk(size)]
    expected = chunks + [[]] * (size - len(chunks))
    assert [list(shard_range(length, rank, size)) for rank in range(size)] == expected


@given(size=st.integers(1, 40))
def test_pieces_of_nothing_are_empty(size: int):
    assert all(not shard_range(0, rank, size) for rank in range(size))


BLOCKER = """
import sys

class OnlyTheStandardLibrary:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top != "megallama":
            raise ImportError(f"{name} is not in the standard library")

sys.meta_path.insert(0, OnlyTheStandardLibrary())
import MODULE
ours = {name for name in sys.modules if name.startswith("megallama")}
assert ours == set(EXPECTED), ours
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("module", ["placements", "pipeline.schedule", "pipeline.split"])
def test_the_planners_modules_import_the_standard_library_alone(module: str):
    name = f"megallama.parallel.{module}"
    parts = name.split(".")
    expected = [".".join(parts[: n + 1]) for n in range(len(parts))]
    code = BLOCKER.replace("MODULE", name).replace("EXPECTED", repr(expected))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
