"""Whatever is given, the answer is a Config or a UserError."""

from contextlib import suppress
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megallama.config.errors import UserError
from megallama.config.fields import keys
from megallama.config.load import load_text
from megallama.config.rules import required_processes, resolve_world
from megallama.config.schema import Config
from tests.config.sample import RUN

KEYS = [key for key, _ in keys()]
NAMES = st.sampled_from([key.rsplit(".", 1)[-1] for key in KEYS] + ["preset", "<<", "zzz", ""])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([0, 2**63 - 1, 2**63, 10**30, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["tiny", "1f1b", "interleaved_1f1b", "wsd", "stdlib", "bf16"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


def answer(text: str, overrides: list[str]) -> Config | None:
    """The config, or None for a UserError that can be printed."""
    try:
        return load_text(text, overrides)
    except UserError as error:
        assert error.problems and str(error)
        return None


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80), st.lists(st.text(max_size=30), max_size=2))
@example("a: \ud800", [])
@example('"\\ud800": 1', [])
@example('layout: {"\\ud800": 1}', [])
@example("? {a: b}\n: c", [])
@example("%YAML 9.9\n---\na: 1", [])
@example("&a : *a", [])
def test_any_text(text: str, overrides: list[str]) -> None:
    answer(text, overrides)


@settings(max_examples=200, deadline=None)
@given(st.text("abz:-[]{}&*!|>'\"#%@, \n\t\\?<0e.~", max_size=60))
def test_any_text_of_yaml_signs(text: str) -> None:
    answer(text, [f"run={text}"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES | st.sampled_from(list(Config.model_fields)), VALUES, max_size=6))
def test_any_mapping(data: dict[str, Any]) -> None:
    answer(yaml.safe_dump(data), [])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=4), st.integers(0, 9)
)
def test_any_values_in_a_good_file(pairs: list[tuple[str, Any]], world: int) -> None:
    dumped = [(key, yaml.safe_dump(value, default_flow_style=True)) for key, value in pairs]
    config = answer(
        RUN, [f"{key}={text.removesuffix(chr(10) + '...' + chr(10))}" for key, text in dumped]
    )
    if config:
        assert required_processes(config, world) > 0
        with suppress(UserError):
            assert resolve_world(config, world).layout.data_shard > 0


@pytest.mark.parametrize("value", [2**63 - 1, 2**62, 3 * 5 * 7 * 11 * 13 * 17 * 19])
@pytest.mark.parametrize("key", [k for k, f in keys() if f.annotation is int])
def test_huge_numbers_take_no_time(key: str, value: int) -> None:
    answer(RUN, [f"{key}={value}"])
