"""The runs and model presets that come with MegaLlama, by name."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

Shelf = Literal["runs", "models"]


def names(shelf: Shelf) -> list[str]:
    """The shipped names, sorted: `quickstart`, or `llama3.1_8b` for models."""
    found = [entry.name for entry in (files("megallama_configs") / shelf).iterdir()]
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def text(shelf: Shelf, name: str) -> str:
    """The YAML of a shipped run or preset; `name` is one of `names(shelf)`."""
    return (files("megallama_configs") / shelf / f"{name}.yaml").read_text(encoding="utf-8")
