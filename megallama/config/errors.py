"""What the user must fix: one error type that carries every problem found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing to fix."""

    key: str
    """Dotted key such as `layout.tensor`; empty where no key is at fault."""
    message: str
    """What is wrong, the value, and what would be right."""
    where: str = ""
    """`file:line:column`, or `command line: key=value`."""
    excerpt: str = ""
    """The source line and, below it, a caret."""

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.key, self.message) if part)
        return "\n".join([head, *(f"    {line}" for line in self.excerpt.splitlines())])


class UserError(Exception):
    """The user must fix something; the command prints this and exits with 2.

    `title` is what the problems are about, usually a file's name; without it there is no header.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], title: str = "") -> None:
        super().__init__(problems, title)
        self.problems = tuple(problems)
        self.title = title

    @classmethod
    def one(cls, key: str, message: str) -> UserError:
        """A single problem, without a place in a file."""
        return cls([Problem(key, message)])

    def __str__(self) -> str:
        count = len(self.problems)
        header = f"{self.title}: {count} problem{'s' if count != 1 else ''}"
        lines = [line for problem in self.problems for line in str(problem).splitlines()]
        return "\n".join([header, *(f"  {line}" for line in lines)] if self.title else lines)
