"""Results as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

RESULTS = "results.json"
OURS = "ours"
BARS = {"forward": 0.85, "backward": 0.80}
"""Shares of the copy's bandwidth that ours is to reach, by pass."""


@dataclass
class Row:
    """One implementation of one pass at one shape; None where nothing was measured."""

    op: str
    what: str
    shape: str
    implementation: str
    ms: float | None = None
    """Median."""
    ms_least: float | None = None
    """Of the rounds' medians."""
    ms_most: float | None = None
    host_us: float | None = None
    """Until the host had queued it."""
    gb_s: float | None = None
    """Bytes of the floor over `ms`."""
    of_floor: float | None = None
    """The least time, by the ceilings measured, over `ms`."""
    difference: float | None = None
    """From exact arithmetic, over the largest element."""
    peak_mib: float | None = None
    """Allocated beyond what was there before the pass, results included."""
    problem: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What a later measurement replaces."""
        return self.op, self.what, self.shape, self.implementation

    def line(self) -> str:
        """For the console."""
        name = f"{self.op} {self.what} {self.shape} {self.implementation}"
        time = "" if self.ms is None else f" {self.ms:.4f} ms"
        share = "" if self.of_floor is None else f", {self.of_floor:.0%} of the floor"
        return f"{name}:{time}{share}{f' ({self.problem})' if self.problem else ''}"


@dataclass
class Bench:
    """One call of the command on one machine."""

    conditions: dict[str, str]
    dry_run: bool
    copy_gb_s: float
    product_tflops: float
    rows: list[Row] = field(default_factory=list)


def read_benches(folder: Path) -> list[Bench]:
    """What a folder holds already."""
    file = folder / RESULTS
    if not file.exists():
        return []
    benches = [Bench(**plain) for plain in json.loads(file.read_text())]
    for bench in benches:
        bench.rows = [Row(**plain) for plain in bench.rows]  # type: ignore[arg-type]
    return benches


def write_report(folder: Path, benches: Sequence[Bench]) -> None:
    """`results.json` and `results.md`."""
    plain = [asdict(bench) for bench in benches]
    (folder / RESULTS).write_text(json.dumps(plain, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(benches))


def markdown(benches: Sequence[Bench]) -> str:
    """Conditions, ours beside the others, and every row."""
    text = ["# Kernels", ""]
    dry = any(bench.dry_run for bench in benches)
    if dry:
        text += ["**DRY RUN: without a GPU. The times say nothing.**", ""]
    for bench in benches:
        about = ", ".join(f"{name} {value}" for name, value in bench.conditions.items())
        ceilings = f"copy {bench.copy_gb_s:,.0f} GB/s, product {bench.product_tflops:,.1f} TFLOP/s"
        text.append(f"- {about}; {ceilings}")
    rows = latest_rows(benches)
    text += ["", "## Ours beside the others", "", *_comparison(rows, bars={} if dry else BARS)]
    text += ["", "## Every row", "", *_every(rows)]
    return "\n".join(text) + "\n"


def subtitle(benches: Sequence[Bench]) -> str:
    """Of plots."""
    where = dict.fromkeys(f"{x.conditions['device']}, {x.conditions['date']}" for x in benches)
    return "; ".join(where)


def latest_rows(benches: Sequence[Bench]) -> list[Row]:
    """Of several measurements of one thing, the last."""
    return list({row.key: row for bench in benches for row in bench.rows}.values())


def _comparison(rows: Sequence[Row], bars: Mapping[str, float]) -> Iterator[str]:
    """A line for each pass: others' times over ours, so that more than 1 means ours is faster."""
    others = list(dict.fromkeys(row.implementation for row in rows if row.ms is not None))
    others = [name for name in others if name != OURS]
    yield f"| op | pass | shape | ms | of floor | bar | {' | '.join(others)} |"
    yield "|---" * (6 + len(others)) + "|"
    by_key = {row.key: row for row in rows}
    for row in rows:
        if row.implementation != OURS:
            continue
        cells = [
            row.op,
            row.what,
            row.shape,
            _number(row.ms, 4),
            _share(row.of_floor),
            _bar(row, bars),
        ]
        for name in others:
            other = by_key.get((row.op, row.what, row.shape, name))
            cells.append(_ratio(row, other))
        yield f"| {' | '.join(cells)} |"


def _bar(row: Row, bars: Mapping[str, float]) -> str:
    bar = bars.get(row.what)
    if row.problem:
        return "**fails**"
    if bar is None or row.of_floor is None:
        return ""
    return f"{bar:.0%} {'met' if row.of_floor >= bar else '**missed**'}"


def _ratio(ours: Row, other: Row | None) -> str:
    """Nothing is called faster than a result that is wrong, nor a wrong result faster."""
    if other is None or other.ms is None or ours.ms is None:
        return ""
    wrong = ours.problem or other.problem
    return "wrong" if wrong else f"{other.ms / ours.ms:.2f}"


def _every(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| op | pass | shape | implementation | ms | rounds | host µs | GB/s | of floor "
        "| difference | peak MiB | problem |"
    )
    yield "|---" * 12 + "|"
    for row in rows:
        spread = "" if row.ms is None else f"{row.ms_least:.4f} to {row.ms_most:.4f}"
        error = "" if row.difference is None else f"{row.difference:.1e}"
        cells = [
            *row.key,
            _number(row.ms, 4),
            spread,
            _number(row.host_us, 0),
            _number(row.gb_s, 0),
        ]
        cells += [_share(row.of_floor), error, _number(row.peak_mib, 0), row.problem]
        yield f"| {' | '.join(cells)} |"


def _number(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:,.{digits}f}"


def _share(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"
