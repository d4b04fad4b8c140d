"""What pydantic finds, said in words: what was expected, what was written, and what to write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megallama.config.document import Document, KeyPath, dotted
from megallama.config.fields import keys, section_at
from megallama.config.suggest import either, nearest

EXPECTED = {
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "bool_type": "expected true or false",
    "list_type": "expected a list",
    "model_type": "expected a section",
    "literal_error": "expected {expected}",
    "greater_than": "expected a number above {gt}",
    "greater_than_equal": "expected {ge} or more",
    "less_than": "expected a number below {lt}",
    "less_than_equal": "expected at most {le}",
    "too_short": "expected at least {min_length} entry",
    "string_too_short": "expected some text",
}

EXAMPLES = {
    "model": "model: tiny",
    "model.hidden": "hidden: 128",
    "model.layers": "layers: 4",
    "model.heads": "heads: 4",
    "model.kv_heads": "kv_heads: 2",
    "model.head_dim": "head_dim: 32",
    "model.ffn": "ffn: 384",
    "model.vocab": "vocab: 512",
    "model.rope_scaling": "rope_scaling: {factor: 8.0}",
    "model.rope_scaling.factor": "factor: 8.0",
    "layout": "layout: {tensor: 2}",
    "data": "data: {seq_len: 192}",
    "data.sources": "sources: [{path: stdlib}]",
    "data.sources.0": "{path: stdlib}",
    "data.sources.0.path": "path: stdlib",
    "train": "train: {global_batch_tokens: 1536, steps: 150}",
    "train.global_batch_tokens": "global_batch_tokens: 1536",
    "train.steps": "steps: 150",
    "kernels": "kernels: {rms_norm: triton}",
    "optimizer": "optimizer: {lr: 3e-4}",
    "optimizer.lr": "lr: 3e-4",
    "lr_schedule": "lr_schedule: {warmup_steps: 10}",
    "evaluation": "evaluation: {every: 50}",
    "checkpoint": "checkpoint: {every: 50}",
    "metrics": "metrics: {every: 10}",
    "metrics.wandb": "wandb: {mode: disabled}",
}


def message(error: Mapping[str, Any], path: KeyPath, document: Document) -> str:
    """One line on what is wrong with the value at `path`, with a hint where one is known."""
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return unknown_key(path)
    if kind == "missing":
        return missing_key(path)
    template = EXPECTED.get(kind)
    if path == ("model",):
        template = "expected a preset's name or a section"
    if template is None:
        return f"{error['msg']}, got {shown(value)}"
    written = document.values[path].written if path in document.values else ""
    bounds = error.get("ctx", {}).items()
    whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in bounds}
    expected = template.format(**whole)
    return f"{expected}, got {shown(value, written)}{hint(kind, value, path)}"


def shown(value: Any, written: str = "") -> str:
    """The value as its user wrote it, at most 60 characters; sections and lists by their kind."""
    if isinstance(value, dict | list):
        return ("a section" if isinstance(value, dict) else "a list") + ("" if value else ", empty")
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str) else written or str(value).lower()
    return text if len(text) <= 60 else f"{text[:57]}..."


def hint(kind: str, value: Any, path: KeyPath) -> str:
    """`: write 1000000` and the like; empty where nothing is sure to be meant."""
    if kind in ("int_type", "float_type"):
        number = _number(value)
        whole = isinstance(number, float) and number.is_integer() and abs(number) < 1e15
        if whole and kind == "int_type":
            return f": write {int(number or 0)}"
        return f": write {value.strip()} without quotes" if kind == "float_type" and number else ""
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f": put it in quotes, '{str(value).lower()}'"
    if kind == "bool_type":
        words = {
            "yes": "true",
            "on": "true",
            "1": "true",
            "no": "false",
            "off": "false",
            "0": "false",
        }
        meant = words.get(str(value).lower()) or str(value).lower()
        return f": write {meant}" if meant in ("true", "false") else ""
    if kind == "literal_error" and isinstance(value, str):
        near = nearest(value, _choices(path))
        return f": did you mean {near[0]!r}?" if near else ""
    if kind in ("model_type", "list_type", "too_short"):
        example = EXAMPLES.get(_generic(path))
        return f": for example `{example}`" if example else ""
    return ""


def _number(value: Any) -> float | None:
    """The number that a quoted or float value stands for; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | float):
        return None
    try:
        return float(str(value).replace(",", "").replace("_", ""))
    except ValueError:
        return None


def _choices(path: KeyPath) -> list[str]:
    section = section_at(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    return [str(choice) for choice in getattr(field.annotation, "__args__", ())] if field else []


def _generic(path: KeyPath) -> str:
    """The key with every list position as 0, as in the tables here."""
    return dotted(tuple(0 if isinstance(step, int) else step for step in path))


def unknown_key(path: KeyPath) -> str:
    """Names the key that was probably meant: here, in another section, or all keys of this one."""
    name = str(path[-1])
    section = section_at(path[:-1])
    siblings = list(section.model_fields) if section else []
    if path[0] == "model" and len(path) == 2:
        siblings.append("preset")
    known = [key for key, _ in keys()]
    elsewhere = [key for key in known if key.rsplit(".", 1)[-1] == name]
    here = dotted(path[:-1]) or "the top level"
    if "." in name and name in known:
        outer, inner = name.split(".", 1)
        nested = f"`{outer}: {{{inner}: ...}}`"
        return f"unknown key: dots are for the command line; in a file, write {nested}"
    near = nearest(name, siblings)
    if near and not elsewhere:
        return f"unknown key: did you mean {near[0]!r}?"
    if elsewhere:
        also = f", or did you mean {near[0]!r}?" if near else ""
        return f"unknown key in {here}: it belongs in {either(elsewhere)}{also}"
    near = nearest(name, [key.rsplit(".", 1)[-1] for key in known])
    far = [key for key in known if near and key.rsplit(".", 1)[-1] == near[0]]
    if far:
        return f"unknown key in {here}: did you mean {either(far)}?"
    return f"unknown key: {here} has {', '.join(siblings)}"


def missing_key(path: KeyPath) -> str:
    """Says what a required key is for and gives an example line."""
    key = _generic(path)
    example = f"for example `{EXAMPLES[key]}`" if key in EXAMPLES else ""
    inner = section_at(path) if len(path) == 1 else None
    if inner is None:
        return ", ".join(part for part in ("required key is missing", example) if part)
    needs = [name for name, field in inner.model_fields.items() if field.is_required()]
    return f"required section is missing: it needs {', '.join(needs)}; {example}"
