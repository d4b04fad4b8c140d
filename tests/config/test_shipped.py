"""Every YAML that comes with MegaLlama."""

import pytest
import yaml

from megallama.config import shipped
from megallama.config.load import load_config
from megallama.config.rules import required_processes, resolve_world
from megallama.config.schema import ModelConfig, parameter_count

PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.1_405b": 405_853_388_800,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "small": 25_698_816,
    "tiny": 918_656,
}

WORLDS = {
    "quickstart": 4,
    "tensor": 2,
    "pipeline": 2,
    "data_shard": 2,
    "data_replicate": 4,
    "tensor_pipeline_data": 8,
    "context": 2,
    "interleaved": 2,
    "all_axes": 16,
    "llama3.2_1b_1gpu": 1,
    "llama3.1_8b_8gpu": 8,
    "llama3.1_70b_64gpu": 64,
    "llama3_405b_8192gpu": 8192,
    "llama3_405b_16384gpu": 16384,
    "llama3_405b_16384gpu_128k": 16384,
}


def test_every_file_is_listed_here() -> None:
    assert shipped.names("models") == sorted(PUBLISHED)
    assert shipped.names("runs") == sorted(WORLDS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    text = shipped.text("models", name)
    model = load_config("tensor", [f"model={name}", "layout.tensor=1"]).model
    assert parameter_count(model) == PUBLISHED[name]
    first = text.split("\nhidden:")[0]
    assert f"{PUBLISHED[name]:,}" in first, "the opening comment gives the count"


@pytest.mark.parametrize("name", PUBLISHED)
def test_rope_scaling_belongs_to_3_1_and_3_2(name: str) -> None:
    model = load_config("tensor", [f"model={name}", "layout.tensor=1"]).model
    factor = model.rope_scaling.factor if model.rope_scaling else None
    assert factor == {"llama3.1": 8.0, "llama3.2": 32.0}.get(name.split("_")[0])
    assert model.tie_embeddings == name.startswith("llama3.2")


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_read_the_same_with_any_yaml_reader(name: str) -> None:
    model = load_config("tensor", [f"model={name}", "layout.tensor=1"]).model
    assert ModelConfig.model_validate(yaml.safe_load(shipped.text("models", name))) == model


@pytest.mark.parametrize("name", WORLDS)
def test_run_loads_and_fits_its_world(name: str) -> None:
    config = load_config(name)
    resolved = resolve_world(config, WORLDS[name])
    assert resolved.layout.data_shard > 0
    assert required_processes(config, WORLDS[name]) == WORLDS[name]
    assert config.run == f"runs/{name}"
    assert shipped.text("runs", name).startswith("# "), "opens with what it is for"


@pytest.mark.parametrize(
    ("name", "layout", "seq_len", "micro_batches"),
    [
        ("llama3_405b_8192gpu", (8, 1, 16, 64), 8192, 32),
        ("llama3_405b_16384gpu", (8, 1, 16, 128), 8192, 16),
        ("llama3_405b_16384gpu_128k", (8, 16, 16, 8), 131_072, 16),
    ],
)
def test_llama_3_table_4(
    name: str, layout: tuple[int, ...], seq_len: int, micro_batches: int
) -> None:
    config = load_config(name)
    cut = config.layout
    assert (cut.tensor, cut.context, cut.pipeline, cut.data_shard) == layout
    assert (config.data.seq_len, config.train.global_batch_tokens) == (seq_len, 2**24)
    assert config.train.global_batch_tokens // seq_len // cut.data_shard == micro_batches


def test_quickstart_is_eight_samples_a_step() -> None:
    config = load_config("quickstart")
    assert config.train.global_batch_tokens == 8 * config.data.seq_len == 1536
    assert config.layout.tensor == config.layout.pipeline == config.layout.micro_batch == 2
