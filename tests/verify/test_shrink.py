from __future__ import annotations

import pytest

from megallama.config import shipped
from megallama.config.load import load_config
from megallama.config.schema import vocab_rows
from megallama.verify.shrink import shrink, world_size


@pytest.mark.parametrize("run", shipped.names("runs"))
@pytest.mark.parametrize("processes", [16, 4])
def test_every_shipped_run_has_a_twin(run, processes):
    config = load_config(run)
    twin = shrink(config, dtype="float64", steps=3, max_processes=processes)
    assert world_size(twin.layout) <= processes
    for axis in ("tensor", "pipeline", "data_replicate"):
        kept = getattr(twin.layout, axis) > 1
        assert kept or getattr(config.layout, axis) == 1 or processes < 16
    assert twin.model.tie_embeddings == config.model.tie_embeddings
    uneven = config.model.vocab % 128 > 0
    assert (vocab_rows(twin.model) > twin.model.vocab) == uneven


def test_uneven_layers_and_few_kv_heads_stay(config_for):
    config = config_for(
        model={"layers": 7, "kv_heads": 2, "heads": 8}, layout={"tensor": 4, "pipeline": 4}
    )
    twin = shrink(config, dtype="float32", steps=3, max_processes=16)
    assert twin.model.layers % 4
    assert twin.model.kv_heads < twin.layout.tensor


@pytest.mark.parametrize(
    ("run", "freed"), [("llama3.1_8b_8gpu", True), ("llama3.2_1b_1gpu", False)]
)
def test_a_twin_frees_its_weights_as_the_config_does(run, freed):
    twin = shrink(load_config(run), dtype="float32", steps=3, max_processes=16)
    assert twin.layout.reshard_after_forward is freed
