"""`model: NAME` and `model: {preset: NAME, layers: 4}`, replaced by all the model's fields."""

from __future__ import annotations

from typing import Any

from megallama.config import shipped
from megallama.config.document import Document, parse
from megallama.config.suggest import nearest
from megallama.config.wording import shown


def name_to_section(document: Document) -> None:
    """`model: NAME` becomes `model: {preset: NAME}`, so that overrides can change its fields."""
    name = document.data.get("model")
    if isinstance(name, str):
        document.data["model"] = {"preset": name}
        document.keys["model", "preset"] = document.mark(("model",), of_key=True)
        document.values["model", "preset"] = document.mark(("model",))


def insert_preset(document: Document) -> None:
    """Put the preset's fields under the ones written beside it; an unknown name is reported."""
    model = document.data.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    changes = {key: value for key, value in model.items() if key != "preset"}
    name, names = model["preset"], shipped.names("models")
    if name in names:
        preset = parse(shipped.text("models", name), f"models/{name}.yaml").data
        document.data["model"] = merged(preset, changes)
        return
    near = nearest(name, names) if isinstance(name, str) else []
    advice = f"did you mean {near[0]!r}? " if near else ""
    what = f"there is no preset {shown(name)}: {advice}presets are {', '.join(names)}"
    document.report(("model", "preset"), what)
    document.data["model"] = changes


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, section by section."""
    both = {
        key: merged(base[key], value)
        if isinstance(value, dict) and isinstance(base.get(key), dict)
        else value
        for key, value in changes.items()
    }
    return base | both
