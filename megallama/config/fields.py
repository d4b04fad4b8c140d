"""The schema as a list of keys: what exists, where, of which type, in words."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megallama.config.document import KeyPath
from megallama.config.schema import Config, Section

TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def section_of(annotation: Any) -> type[Section] | None:
    """The section inside `Section`, `Section | None` or `list[Section]`, else None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = [section_of(arg) for arg in get_args(annotation)]
    return next((section for section in inner if section), None)


def section_at(path: KeyPath) -> type[Section] | None:
    """The section whose keys stand at `path`; list positions are passed over."""
    section: type[Section] | None = Config
    for step in path:
        if isinstance(step, int) or section is None:
            continue
        field = section.model_fields.get(step)
        section = section_of(field.annotation) if field else None
    return section


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key and its field, sections before their keys; lists show their entry 0."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_of(field.annotation)
        if inner:
            entry = "0." if is_list(field.annotation) else ""
            yield from keys(inner, f"{prefix}{name}.{entry}")


def is_list(annotation: Any) -> bool:
    """Whether the annotation is `list[...]`."""
    return get_origin(annotation) is list


def type_in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """`int` above 0 -> `whole number > 0`; a Literal -> its words; `| None` is left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        bounds = [bound for item in extra for bound in getattr(item, "metadata", [item])]
        return type_in_words(inner, bounds)
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        kinds = [arg for arg in get_args(annotation) if arg is not type(None)]
        return " or ".join(type_in_words(kind, metadata) for kind in kinds)
    if is_list(annotation):
        return "list of sections" if section_of(annotation) else "list"
    if section_of(annotation):
        return "section"
    bounds = [_bound(item) for item in metadata if _bound(item)]
    return f"{TYPES[annotation]} {', '.join(bounds)}".rstrip()


def _bound(item: Any) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<"}
    return next(
        (f"{s} {getattr(item, name)}" for name, s in signs.items() if hasattr(item, name)), ""
    )
