"""The config as text: YAML that loads back, JSON Schema, and the table of keys."""

from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megallama.config import shipped
from megallama.config.describe import describe, explain, json_schema, to_yaml
from megallama.config.errors import UserError
from megallama.config.fields import keys
from megallama.config.load import load_config, load_text
from megallama.config.schema import Config
from megallama.config.wording import EXAMPLES
from tests.config.sample import load

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


@pytest.mark.parametrize("name", shipped.names("runs"))
def test_yaml_loads_back(name: str) -> None:
    config = load_config(name)
    assert load_text(to_yaml(config)) == config


@settings(max_examples=60, deadline=None)
@example(run="a\x85b\u2028c\n", lr=1.0, seed=0)  # line breaks that PyYAML folds
@given(run=TEXT, lr=st.floats(1e-300, 1e300), seed=st.integers(0, 2**63 - 1))
def test_yaml_loads_back_whatever_the_values(run: str, lr: float, seed: int) -> None:
    config = load()
    changed = config.model_copy(
        update={
            "run": run,
            "optimizer": config.optimizer.model_copy(update={"lr": lr}),
            "train": config.train.model_copy(update={"seed": seed}),
            "lr_schedule": config.lr_schedule.model_copy(update={"min_lr": 0.0}),
        }
    )
    assert load_text(to_yaml(changed)) == changed


@pytest.mark.parametrize("word", ["1e3", "yes", "null", "010", "1_0", "2026-01-01", "~", "<<", "="])
def test_words_like_numbers_stay_text_for_every_reader(word: str) -> None:
    config = load().model_copy(update={"run": word})
    assert load_text(to_yaml(config)).run == word
    assert yaml.safe_load(to_yaml(config))["run"] == word


def test_json_schema_takes_a_preset_a_section_or_both() -> None:
    schema = json_schema()
    name, section, changed = schema["properties"]["model"]["anyOf"]
    assert "llama3.1_8b" in name["enum"]
    assert section == {"$ref": "#/$defs/ModelConfig"}
    assert changed == {"$ref": "#/$defs/ModelPreset"}
    assert schema["$defs"]["ModelPreset"]["required"] == ["preset"]
    assert "heads" in schema["$defs"]["ModelConfig"]["required"]
    assert "preset" not in schema["$defs"]["ModelConfig"]["properties"]


def test_json_schema_takes_underscores_and_refuses_unknown_keys() -> None:
    schema = json_schema()
    steps = schema["$defs"]["TrainConfig"]["properties"]["steps"]
    assert steps["type"] == ["integer", "string"] and steps["exclusiveMinimum"] == 0
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)


def test_every_key_is_described_with_type_default_and_meaning() -> None:
    table = describe(width=400)
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    for key, field in keys():
        about = field.description or getattr(field.annotation, "__doc__", None)
        assert about, f"{key} has no description"
        assert " ".join(about.split())[:60] in lines[key]
    assert "whole number > 0" in lines["train.steps"] and "required" in lines["train.steps"]
    assert "number >= 0, < 1" in lines["optimizer.beta1"]
    assert "gpipe | 1f1b |" in lines["layout.schedule"]
    assert "stdlib" in lines["data.sources"]


def test_explain_one_key_or_a_section() -> None:
    assert "Ranks that split the layers." in explain("layout.pipeline")
    assert "layout.tensor" in explain("layout") and "train" not in explain("layout")
    assert "data.sources.0.weight" in explain("data.sources")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("tensor", "did you mean layout.tensor?"),
        ("layout.tensr", "did you mean layout.tensor"),
        ("zzz", "sections: run, model, layout"),
    ],
)
def test_explain_an_unknown_key(key: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        explain(key)
    assert says in str(caught.value)


def test_every_required_key_and_section_has_an_example_that_is_right() -> None:
    for key, field in keys():
        if field.is_required() or ("." not in key and field.annotation is not str):
            assert key in EXAMPLES, key
    whole: dict[str, Any] = {
        name: yaml.safe_load(EXAMPLES[name].replace("3e-4", "3.0e-4"))[name]
        for name in Config.model_fields
        if name in EXAMPLES
    }
    assert load_text(yaml.safe_dump(whole)).model.hidden == 128
