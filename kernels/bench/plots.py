"""Bars of what each implementation reaches, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from report import BARS, Row

COLUMNS = 4
"""Panels side by side."""


def plot(folder: Path, rows: Sequence[Row], subtitle: str) -> None:
    """`floor.png`, shares of the floor by op and pass, and `memory.png`, of the loss."""
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return
    shares = [row for row in rows if row.of_floor is not None]
    _panels(
        folder / "floor.png",
        shares,
        f"Least time by measured copy and product, over the median, %\n{subtitle}",
        lambda row: 100 * (row.of_floor or 0),
    )
    loss = [row for row in rows if row.op == "linear_cross_entropy" and row.what == "both"]
    _panels(
        folder / "memory.png",
        [row for row in loss if row.peak_mib is not None],
        f"Peak memory of head and loss, forward and backward, GiB\n{subtitle}",
        lambda row: (row.peak_mib or 0) / 1024,
    )


def _panels(file: Path, rows: Sequence[Row], title: str, value: Callable[[Row], float]) -> None:
    """A panel for each op and pass, a group of bars for each shape."""
    passes = list(dict.fromkeys((row.op, row.what) for row in rows))
    if not passes:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(passes))
    lines = -(-len(passes) // columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(5 * columns, 3.2 * lines + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(passes) :]:
        axis.axis("off")
    names = list(dict.fromkeys(row.implementation for row in rows))
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    for axis, (op, what) in zip(axes.flat, passes, strict=False):
        shown = [row for row in rows if (row.op, row.what) == (op, what)]
        _panel(axis, shown, value, colors)
        axis.set_title(f"{op} {what}")
        if file.stem == "floor" and what in BARS:
            axis.axhline(100 * BARS[what], color="black", linewidth=0.8, linestyle="--")
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _panel(
    axis: Any, rows: Sequence[Row], value: Callable[[Row], float], colors: Mapping[str, str]
) -> None:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        bars = {shapes.index(row.shape): value(row) for row in rows if row.implementation == name}
        places = [at - 0.4 + (number + 0.5) * width for at in bars]
        axis.bar(places, list(bars.values()), width, label=name, color=colors[name])
    axis.set_xticks(range(len(shapes)), shapes)
    axis.legend(fontsize=7)
