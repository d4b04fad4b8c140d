"""`key=value` from the command line, and presets with changes."""

import pytest

from megallama.config.load import load_text
from tests.config.sample import RUN, changed, load, refusal

PRESET = changed(RUN.splitlines()[1], "model: llama3.1_8b")


def test_values_are_set_in_order() -> None:
    config = load("train.steps=20", "train.steps=30", "optimizer.lr=3e-4", "run=a=b")
    assert (config.train.steps, config.optimizer.lr, config.run) == (30, 3e-4, "a=b")


def test_default_entries_and_missing_sections_are_filled_in() -> None:
    config = load("data.sources.0.path=x.txt", "metrics.wandb.mode=offline", "evaluation.every=5")
    assert config.data.sources[0].path == "x.txt"
    assert (config.metrics.wandb.mode, config.evaluation.every) == ("offline", 5)


def test_whole_sections_and_lists() -> None:
    config = load("data.sources=[{path: a}, {path: b, weight: 2}]", "data.sources.1.weight=3")
    assert [source.weight for source in config.data.sources] == [1.0, 3.0]
    assert load("layout={tensor: 2}").layout.data_shard == -1


def test_an_override_repairs_the_file() -> None:
    assert load_text(changed("steps: 100", "steps: many"), ["train.steps=20"]).train.steps == 20
    assert load_text(changed("{lr: 3e-3}", ""), ["optimizer.lr=1"]).optimizer.lr == 1.0


def test_presets_and_changes() -> None:
    assert load_text(PRESET).model.layers == 32
    assert load_text(PRESET, ["model.layers=4"]).model.layers == 4
    assert load_text(PRESET, ["model=llama3.2_1b"]).model.tie_embeddings
    assert load_text(PRESET, ["model.preset=llama3_70b"]).model.layers == 80
    assert load("model=tiny", "model.layers=2").model.layers == 2
    section = load_text(PRESET.replace("llama3.1_8b", "{preset: llama3.1_8b, layers: 5}")).model
    assert (section.layers, section.hidden) == (5, 4096)


def test_changes_reach_into_a_preset() -> None:
    scaling = load_text(PRESET, ["model.rope_scaling.high_freq_factor=2"]).model.rope_scaling
    assert scaling is not None and (scaling.factor, scaling.high_freq_factor) == (8.0, 2.0)
    assert load_text(PRESET, ["model.rope_scaling=null"]).model.rope_scaling is None


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("train.steps=many", "train.steps", "expected a whole number, got 'many'"),
        ("train.steps=1e6", "train.steps", "got 1e6: write 1000000"),
        ("train.stepz=1", "train.stepz", "did you mean 'steps'?"),
        ("steps=1", "steps", "it belongs in train.steps"),
        ("layout.tensor=3", "layout.tensor", "use 1, 2 or 4"),
        ("layout={tensor: 3}", "layout.tensor", "use 1, 2 or 4"),
        ("model=llama3_1b", "model.preset", "did you mean 'llama3.2_1b'?"),
        ("model=7", "model", "expected a preset's name or a section, got 7"),
        ("train=5", "train", "expected a section, got 5"),
        ("train.steps", "", "expected key=value, such as train.steps=value"),
        ("=5", "", "expected key=value, such as train.steps=20"),
        ("a..b=5", "", "expected key=value"),
        ("", "", "expected key=value"),
        ("run=[a", "run", "not valid YAML"),
        ("layout={tensor: 1, tensor: 2}", "layout", "written twice"),
        ("layout.tensor.x=2", "layout.tensor.x", "layout.tensor is 1, not a section"),
        ("data.sources.1.path=x", "data.sources.1", "no entry 1: the list has 1, counted from 0"),
        ("data.sources.x=1", "data.sources.x", "there is no entry x"),
        ("data.sources.-1.path=x", "data.sources.-1", "there is no entry -1"),
        (f"data.sources.{'9' * 5000}.path=x", "data.sources.9", "there is no entry 9"),
        ("data.sources.0.path=5", "data.sources.0.path", "put it in quotes, '5'"),
        ("model.preset.x=5", "model.preset", "there is no preset a section: presets are"),
        ("run=", "run", "expected text, got nothing"),
    ],
)
def test_mistakes_are_named_as_the_command_line(override: str, key: str, says: str) -> None:
    error = refusal(RUN, override)
    about = [p for p in error.problems if says in p.message and p.key.startswith(key)]
    assert len(about) == 1, str(error)
    assert about[0].where == f"command line: {override}"
    assert str(error).startswith("run.yaml: ")


def test_a_rule_that_the_preset_breaks_points_at_the_preset() -> None:
    error = refusal(PRESET, "layout.tensor=3")
    assert "3 does not divide model.heads = 32" in str(error)
    (problem,) = refusal(PRESET.replace("llama3.1_8b", "{preset: llama3.1_8b, heads: 30}")).problems
    assert problem.where == "run.yaml:2:1"
    assert "8 does not divide model.heads = 30" in problem.message


def test_an_unknown_preset_still_has_its_changes_checked() -> None:
    error = refusal(PRESET.replace("llama3.1_8b", "{preset: llama9, layerz: 3, heads: x}"))
    assert {p.key for p in error.problems} == {"model.preset", "model.layerz", "model.heads"}
