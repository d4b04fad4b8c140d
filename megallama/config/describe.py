"""The config as text: YAML that loads back, JSON Schema for editors, and a table of all keys."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from megallama.config import shipped
from megallama.config.document import add_resolvers
from megallama.config.errors import UserError
from megallama.config.fields import keys, section_of, type_in_words
from megallama.config.schema import Config
from megallama.config.suggest import nearest

WIDTHS = (38, 26, 14)  # characters for key, type and default; the description takes the rest
INTEGER_WITH_UNDERSCORES = r"^[0-9]+(_[0-9]+)+$"


class _Dumper(yaml.SafeDumper):
    """Quotes the text that the config's reader or another YAML reader takes for a number."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Without double quotes, what PyYAML writes for U+0085 and its like comes back as a space.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


add_resolvers(_Dumper)
_Dumper.add_representer(str, _text)


def to_yaml(config: Config) -> str:
    """Every key, defaults included; loads back to an equal config."""
    return yaml.dump(
        config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema of a run's YAML, for completion and checks in editors.

    `model` may be a preset's name, a section, or a preset with changes. Whole numbers may have
    underscores, which editors take for text.
    """
    schema = _allow_underscores(Config.model_json_schema())
    presets = {"enum": shipped.names("models"), "description": "A shipped model's name."}
    section = schema["$defs"]["ModelConfig"]
    changed = copy.deepcopy(section)
    changed["required"] = ["preset"]
    changed["properties"] = {"preset": presets, **changed["properties"]}
    changed["description"] = "A shipped model with some fields changed."
    schema["$defs"]["ModelPreset"] = changed
    refs = [{"$ref": f"#/$defs/{name}"} for name in ("ModelConfig", "ModelPreset")]
    schema["properties"]["model"] = {"anyOf": [presets, *refs]}
    return schema


def _allow_underscores(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_allow_underscores(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    same = {key: _allow_underscores(value) for key, value in schema.items()}
    if same.get("type") == "integer":
        same |= {"type": ["integer", "string"], "pattern": INTEGER_WITH_UNDERSCORES}
    return same


def describe(width: int = 120) -> str:
    """A table of every key with its type, default and description, `width` characters wide."""
    return "\n".join(_table(list(keys()), width))


def explain(key: str, width: int = 120) -> str:
    """The same table for one key or section; raises UserError where there is none of that name."""
    rows = list(keys())
    # `data.sources` also stands for its entries: `data.sources.0.path`.
    chosen = [row for row in rows if row[0] == key or row[0].startswith(f"{key}.")]
    if not chosen:
        names = [name for name, _ in rows]
        last = [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        near = last or nearest(key, names, most=3)
        advice = f"did you mean {' or '.join(near)}?" if near else f"sections: {_sections(names)}"
        raise UserError.one(key, f"no such key; {advice}")
    return "\n".join(_table(chosen, width))


def _sections(names: list[str]) -> str:
    return ", ".join(name for name in names if "." not in name)


def _table(rows: list[tuple[str, FieldInfo]], width: int) -> Iterator[str]:
    yield from _row(("key", "type", "default", "description"), width)
    for key, field in rows:
        section = section_of(field.annotation)
        if section and "." not in key:
            yield ""
        about = field.description or (section.__doc__ if section else "") or ""
        kind = type_in_words(field.annotation, field.metadata)
        if key == "model":
            kind = "section or preset's name"
        yield from _row((key, kind, _default(field), about), width)


def _row(cells: tuple[str, str, str, str], width: int) -> Iterator[str]:
    widths = (*WIDTHS, max(24, width - sum(WIDTHS)))
    columns = [
        textwrap.wrap(" ".join(cell.split()), size - 2, break_on_hyphens=False)
        for cell, size in zip(cells, widths, strict=True)
    ]
    for line in range(max(map(len, columns))):
        parts = [column[line] if line < len(column) else "" for column in columns]
        text = "".join(part.ljust(size) for part, size in zip(parts, widths, strict=True))
        yield text.rstrip()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, list):
        return ", ".join(str(getattr(entry, "path", entry)) for entry in field.default)
    if section_of(field.annotation):
        return "none" if field.default is None else ""
    words = {None: "none", True: "true", False: "false"}
    is_word = field.default is None or isinstance(field.default, bool)
    return words[field.default] if is_word else str(field.default)
