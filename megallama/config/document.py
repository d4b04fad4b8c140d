"""YAML text to plain data that remembers where every key and value was written.

Numbers and words are read as YAML 1.2 does: `3e-4` is a number, `yes`, `on` and `2026-01-01` are
text, `010` is ten. `1_000` is a number too. A key written twice is a problem, not an overwrite.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from megallama.config.errors import Problem, UserError

KeyPath = tuple[str | int, ...]

MOST_VALUES = 10_000  # aliases of aliases can stand for billions of values
TAG = "tag:yaml.org,2002:"
WIDEST_EXCERPT = 96  # characters of a source line that an error shows


@dataclass(frozen=True)
class Mark:
    """A place in the file or on the command line."""

    where: str
    """`file:line:column` or `command line: key=value`."""
    excerpt: str = ""
    """The source line and a caret."""
    written: str = ""
    """A plain scalar exactly as written: `1e6` rather than 1000000.0."""
    order: tuple[int, int] = (0, 0)
    """Line and column, to list problems from top to bottom."""


@dataclass
class Document:
    """Plain data, where each part came from, and the problems met so far."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[KeyPath, Mark] = field(default_factory=dict)
    values: dict[KeyPath, Mark] = field(default_factory=dict)
    bad: set[KeyPath] = field(default_factory=set)
    found: list[tuple[Mark, Problem]] = field(default_factory=list)

    def mark(self, path: KeyPath, *, of_key: bool = False) -> Mark:
        """The place of a value (or key), else of the nearest section around it that was written."""
        if path in self.values and not of_key:
            return self.values[path]
        for end in range(len(path), 0, -1):
            mark = self.keys.get(path[:end]) or self.values.get(path[:end])
            if mark:
                return mark
        return Mark(self.name)

    def report(self, path: KeyPath, message: str, mark: Mark | None = None) -> None:
        """Add a problem with the value at `path`; that value counts as unknown from here on."""
        mark = mark or self.mark(path)
        self.bad.add(path)
        self.found.append((mark, Problem(dotted(path), message, mark.where, mark.excerpt)))

    def problems(self) -> list[Problem]:
        """Everything reported, in the order in which it was written, the command line last."""
        return [problem for _, problem in sorted(self.found, key=lambda pair: pair[0].order)]

    def forget(self, path: KeyPath) -> None:
        """Drop the places of everything below `path`, which is about to be replaced."""
        for marks in (self.keys, self.values):
            for old in [old for old in marks if old[: len(path)] == path]:
                del marks[old]


def dotted(path: KeyPath) -> str:
    """`("data", "sources", 0)` -> `data.sources.0`; control characters are escaped."""
    text = ".".join(map(str, path))
    return text if text.isprintable() else repr(text)


def parse(text: str, name: str) -> Document:
    """Read one mapping. Raises UserError where the text is not YAML or not a mapping."""
    document = Document(name)
    data = read_value(text, document)
    if data is not None and not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else f"the single value {text.strip()[:40]!r}"
        what = f"expected keys and values such as `model: tiny` at the top level, got {kind}"
        raise UserError([Problem("", what, f"{name}:1:1")], name)
    document.data = data or {}
    return document


def read_value(text: str, document: Document) -> Any:
    """Any YAML value as plain data, with its places and problems noted in `document`.

    Raises UserError where the text is not YAML.
    """
    lines = text.splitlines()
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _Builder(document, lines).value(node, ())
    except yaml.reader.ReaderError as error:
        before = (text[: error.position] + "x").splitlines()
        problem = f"the character U+{error.character:04X} is not allowed in YAML text"
        mark = _mark(document.name, lines, len(before) - 1, len(before[-1]) - 1, 1)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        parts = [part for part in (error.context, error.problem) if part]
        problem = f"not valid YAML: {', '.join(parts)}"
        problem += next((hint for part, hint in SYNTAX_HINTS.items() if part in problem), "")
        mark = _mark(document.name, lines, at.line, at.column, 1) if at else Mark(document.name)
    except RecursionError:
        problem, mark = "not a config: sections are nested too deeply", Mark(document.name)
    except (
        ValueError,
        ArithmeticError,
        LookupError,
    ) as error:  # PyYAML on escapes such as \UFFFFFFFF
        problem, mark = f"not valid YAML: {error}", Mark(document.name)
    raise UserError([Problem("", problem, mark.where, mark.excerpt)], document.name) from None


SYNTAX_HINTS = {
    r"'\t'": " (indent with spaces, not tabs)",
    "mapping values are not allowed": " (check the indentation; quote a value that holds ': ')",
    "expected <block end>": " (check the indentation: keys of one section start in one column)",
    "could not find expected ':'": " (a key needs a colon and a space after it)",
    "expected a single document": " (keep one config in a file: remove the `---`)",
    "'@'": " (put the value in quotes)",
    "'`'": " (put the value in quotes)",
    "'%'": " (put the value in quotes)",
}


class _Loader(yaml.SafeLoader):
    """Used up to the node tree only, where plain scalars get the tags resolved below."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as PyYAML declares it


RESOLVERS: tuple[tuple[str, str, list[str]], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    # Python refuses to read more than 4,300 digits.
    ("int", r"[-+]?(?=.{1,4000}$)[0-9]+(?:_[0-9]+)*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


def add_resolvers(kind: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    """Teach a PyYAML loader or dumper which plain words are not text here."""
    for tag, pattern, first in RESOLVERS:
        kind.add_implicit_resolver(TAG + tag, re.compile(f"^(?:{pattern})$"), first)


add_resolvers(_Loader)


def _float(text: str) -> float:
    special = {".inf": "inf", ".nan": "nan"}
    sign = "-" if text.startswith("-") else ""
    bare = text.lstrip("+-").lower()
    return float(sign + special.get(bare, bare).replace("_", ""))


SCALARS: dict[str, Callable[[str], Any]] = {
    TAG + "str": str,
    TAG + "bool": lambda text: text.lower() == "true",
    TAG + "null": lambda _: None,
    TAG + "int": lambda text: int(text.replace("_", "")),
    TAG + "float": _float,
}


class _Builder:
    """Walks the node tree once; counts values and open anchors, so that it always ends."""

    def __init__(self, document: Document, lines: list[str]) -> None:
        self.document, self.lines = document, lines
        self.count = 0
        self.open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"aliases stand for over {MOST_VALUES:,} values")
        if id(node) in self.open:
            problem = "an anchor that holds itself"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        self.document.values[path] = self.place(node)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
            return self.scalar(node, path)
        finally:
            self.open.discard(id(node))

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        tag = node.tag.removeprefix(TAG)
        if node.tag not in SCALARS:
            self.document.report(path, f"the tag !!{tag} is not supported: remove it")
            return None
        if any(ch == "\0" or "\ud800" <= ch <= "\udfff" for ch in node.value):
            self.document.report(path, f"{node.value!r} holds a character that is not text")
            return None
        try:
            return SCALARS[node.tag](node.value)
        except ValueError:
            self.document.report(path, f"{node.value[:60]!r} is not what its tag !!{tag} says")
            return None

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        pairs: list[tuple[yaml.Node, yaml.Node]] = node.value
        merged = [value for key, value in pairs if key.tag == TAG + "merge"]
        data: dict[str, Any] = {}
        for value in merged:
            data = self.merge(value, path) | data
        seen: dict[str, int] = {}
        for key, value in pairs:
            if key.tag == TAG + "merge":
                continue
            mark = self.place(key)
            if not isinstance(key, yaml.ScalarNode):
                self.document.report(path, "a key must be a word, got a list or section", mark)
                continue
            child = (*path, key.value)
            if key.value in seen:
                message = f"this key is written twice: first on line {seen[key.value]}"
                self.document.report(child, message, mark)
                continue
            seen[key.value] = key.start_mark.line + 1
            if child in self.document.keys:  # a merged section wrote it before
                self.document.forget(child)
            self.document.keys[child] = mark
            data[key.value] = self.value(value, child)
            if value.start_mark.index == value.end_mark.index:  # nothing to point at
                self.document.values[child] = mark
        return data

    def merge(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        data: dict[str, Any] = {}
        here = self.document.values[path]
        for source in reversed(sources):  # the first one named wins
            if isinstance(source, yaml.MappingNode):
                data |= self.value(source, path)
                self.document.values[path] = here
            else:
                message = "`<<:` takes an alias of a section, such as `<<: *base`"
                self.document.report((*path, "<<"), message, self.place(source))
        return data

    def place(self, node: yaml.Node) -> Mark:
        start, end = node.start_mark, node.end_mark
        width = end.column - start.column if end.line == start.line else 1
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        mark = _mark(self.document.name, self.lines, start.line, start.column, width)
        return Mark(mark.where, mark.excerpt, node.value if plain else "", mark.order)


def _mark(name: str, lines: list[str], line: int, column: int, width: int) -> Mark:
    """`line` and `column` count from 0, as PyYAML does; people count from 1."""
    text = lines[line] if line < len(lines) else ""
    left = max(0, column - WIDEST_EXCERPT // 2)
    shown = "".join(ch if ch.isprintable() else " " for ch in text[left : left + WIDEST_EXCERPT])
    caret = " " * (column - left) + "^" * max(1, min(width, len(shown) - column + left))
    excerpt = f"{shown}\n{caret}" if shown else ""
    return Mark(f"{name}:{line + 1}:{column + 1}", excerpt, order=(line + 1, column + 1))
