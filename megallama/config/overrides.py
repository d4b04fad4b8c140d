"""`key.sub=value` from the command line, written into the data of a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from megallama.config.document import Document, KeyPath, Mark, dotted, read_value
from megallama.config.errors import UserError
from megallama.config.fields import section_at
from megallama.config.presets import name_to_section
from megallama.config.wording import shown


def apply(document: Document, overrides: Sequence[str]) -> None:
    """Apply them in order, the last one wins; what cannot be applied is reported."""
    for number, override in enumerate(overrides):
        said = override if override.isprintable() else repr(override)
        mark = Mark(f"command line: {said}", order=(sys.maxsize, number))
        key, equals, text = override.partition("=")
        steps = key.strip().split(".")
        if not equals or not all(steps):
            example = f"{key}=value" if key and all(steps) else "train.steps=20"
            document.report((), f"expected key=value, such as {example}", mark)
            continue
        scratch = Document(mark.where)
        try:
            value = read_value(text, scratch)
        except UserError as error:
            document.report(tuple(steps), error.problems[0].message, mark)
            continue
        for problem in scratch.problems():
            document.report(tuple(steps), problem.message, mark)
        written = scratch.values[()].written if () in scratch.values else ""
        _assign(document, steps, value, Mark(mark.where, "", written, mark.order))
        name_to_section(document)


def _assign(document: Document, steps: list[str], value: Any, mark: Mark) -> None:
    """Set one value, making the sections on the way to it; reports steps that lead nowhere."""
    holder: Any = document.data
    path: KeyPath = ()
    for step in steps:
        slot: str | int = step
        if isinstance(holder, list):
            slot = int(step) if step.isascii() and step.isdecimal() and len(step) < 9 else -1
            if not 0 <= slot < len(holder):
                message = f"there is no entry {step}: the list has {len(holder)}, counted from 0"
                return document.report((*path, step), message, mark)
        elif not isinstance(holder, dict):
            message = f"{dotted(path)} is {shown(holder)}, not a section: it has no {step!r}"
            return document.report((*path, step), message, mark)
        path = (*path, slot)
        last = len(path) == len(steps)
        if last or (isinstance(holder, dict) and holder.get(slot) is None):
            holder[slot] = value if last else _default(path)
            document.forget(path)
            document.keys[path] = document.values[path] = mark
        holder = holder[slot]
    return None


def _default(path: KeyPath) -> Any:
    """What stands at a key that was not written: its default list, else an empty section."""
    section = section_at(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    if field and isinstance(field.default, list):
        return [entry.model_dump() for entry in field.default]
    return {}
