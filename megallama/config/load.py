"""A YAML file, or the name of a shipped run, plus command-line overrides, to a checked Config.

text -> data with places (document) -> overrides -> preset -> schema -> rules, and every problem
from all of these in one UserError.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from megallama.config import overrides as command_line
from megallama.config import shipped
from megallama.config.document import Document, KeyPath, parse
from megallama.config.errors import Problem, UserError
from megallama.config.fields import section_of
from megallama.config.presets import insert_preset, name_to_section
from megallama.config.rules import Unreadable, rules
from megallama.config.schema import Config, Section
from megallama.config.suggest import nearest
from megallama.config.wording import message

LARGEST_FILE = 2**20  # bytes; stops a checkpoint given by mistake from being read whole


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read and check a run.

    `source` is the path of a YAML file or the name of a shipped run such as `quickstart` (write
    `./quickstart` for a file of that name); `overrides` are `key.sub=value`, the last one wins.
    Raises UserError with everything that must be fixed.
    """
    if source in shipped.names("runs"):
        return load_text(shipped.text("runs", source), overrides, f"{source}.yaml")
    return load_text(_read(source), overrides, source)


def load_text(text: str, overrides: Sequence[str] = (), name: str = "config") -> Config:
    """As load_config, from YAML text; `name` stands for the file in errors."""
    document = parse(text, name)
    name_to_section(document)
    command_line.apply(document, overrides)
    insert_preset(document)
    config = _validate(document)
    for problem in list(rules(config)):
        document.report(_key_path(problem.key), problem.message)
    if document.found:
        raise UserError(document.problems(), name)
    return config


def _read(source: str) -> str:
    """The file's text; raises UserError with the reason where there is none."""
    try:
        with Path(source).open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise _not_found(source) from None
    except IsADirectoryError:
        found = sorted(str(path) for path in Path(source).glob("*.yaml"))
        advice = f"; it holds {', '.join(found[:5])}" if found else ""
        raise _unreadable(source, f"this is a folder, not a YAML file{advice}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or str(error)
        raise _unreadable(source, f"cannot be read: {why}") from None
    if len(data) > LARGEST_FILE:
        raise _unreadable(source, "over 1 MiB, which is no config: expected a YAML file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 text: byte 0x{data[error.start]:02x} on line {line}"
        raise _unreadable(source, f"{what}; expected a YAML file saved as UTF-8") from None


def _not_found(source: str) -> UserError:
    names = shipped.names("runs")
    stem = source.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
    near = nearest(stem, names, most=3)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return _unreadable(source, f"no such file; {meant}shipped runs are {', '.join(names)}")


def _unreadable(source: str, why: str) -> UserError:
    return UserError([Problem("", why, repr(source) if not source.isprintable() else source)])


def _validate(document: Document) -> Config:
    """The Config, or where fields are wrong, report each and return the others as if a Config."""
    try:
        config = Config.model_validate(document.data)
    except ValidationError as failure:
        for error in failure.errors(include_url=False):
            path = error["loc"]
            # A preset that does not exist leaves its fields missing, which is no second problem.
            no_preset = path[:1] == ("model",) and ("model", "preset") in document.bad
            if path in document.bad or (no_preset and error["type"] == "missing"):
                document.bad.add(path)
                continue
            of_key = error["type"] in ("extra_forbidden", "missing")
            text = message(error, path, document)
            document.report(path, text, document.mark(path, of_key=of_key))
    if document.bad:
        return cast(Config, _readable(Config, document.data, document.bad, ()))
    return config


class _Readable:
    """The fields of a section that are valid; asking for another raises Unreadable."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        raise Unreadable(name)


def _readable(
    section: type[Section], data: dict[str, Any], bad: set[KeyPath], path: KeyPath
) -> _Readable:
    """`data` with defaults, without the values at `bad` paths."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner, here = section_of(field.annotation), (*path, name)
        damaged = inner is None and any(place[: len(here)] == here for place in bad)
        if here in bad or damaged or (name not in data and field.is_required()):
            continue
        value = data[name] if name in data else field.get_default(call_default_factory=True)
        nested = inner is not None and isinstance(value, dict)
        fields[name] = _readable(inner, value, bad, here) if inner and nested else value
    return _Readable(fields)


def _key_path(key: str) -> KeyPath:
    return tuple(int(step) if step.isdecimal() else step for step in key.split("."))
