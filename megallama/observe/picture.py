"""A pipeline's step as a picture: one row a rank, one box a computation, in time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from colorsys import hls_to_rgb
from statistics import median
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement


class Computation(NamedTuple):
    """A forward or backward, and when it ran."""

    kind: str
    """`forward` or `backward`."""
    stage: int
    micro_batch: int
    start: float
    stop: float


HUES = {"forward": 212, "backward": 28}
"""Degrees: blue and orange, which the colour-blind can tell apart, too."""

IDLE = "#e9e9ec"

MARGIN = 20.0  # all sizes are in pixels
LABEL = 56.0
ROW, GAP = 24.0, 5.0
HEAD, FOOT = 72.0, 46.0
MOST_WIDTH = 1800.0
BOX_WIDTH = 30.0  # of the usual forward, unless the picture became too wide
LEAST_WIDTH = 640.0
TITLE_SIZE, BOX_SIZE = 16, 11  # fonts
DIGIT = 0.6 * BOX_SIZE  # width of a digit; titles are bold, and mixed letters about as wide


def pipeline_svg(rows: Sequence[Sequence[Computation]], title: str, unit: str) -> str:
    """A step's computations as a self-contained SVG.

    Args:
        rows: of each pipeline rank, in order; stage s is virtual stage s // ranks of its rank.
            There is at least one computation, and all take time.
        title: above the picture; the bubble, in percent of the ranks' time, is added to it.
        unit: of the times, for the axis.

    """
    boxes = [box for row in rows for box in row]
    begin, end = min(box.start for box in boxes), max(box.stop for box in boxes)
    usual = median(box.stop - box.start for box in boxes if box.kind == boxes[0].kind)
    busy = sum(box.stop - box.start for box in boxes)
    bubble = 1 - busy / (len(rows) * (end - begin))
    readable = "".join(letter for letter in title if letter.isprintable())
    heading = f"{readable}. Bubble: {100 * bubble:.1f} % of the ranks' time"
    least = max(LEAST_WIDTH, 0.6 * TITLE_SIZE * len(heading) - LABEL)
    width = max(least, min(MOST_WIDTH, BOX_WIDTH * (end - begin) / usual))
    height, scale = len(rows) * (ROW + GAP), width / (end - begin)
    svg = _page(width + LABEL + 2 * MARGIN, height + HEAD + FOOT)
    _text(svg, heading, MARGIN, 28, size=TITLE_SIZE, weight="bold")
    stages = 1 + max(box.stage for box in boxes) // len(rows)
    _legend(svg, stages, [kind for kind in HUES if any(box.kind == kind for box in boxes)])
    digits = max(len(str(box.micro_batch)) for box in boxes)
    numbers = digits * DIGIT + 2 <= usual * scale
    for rank, row in enumerate(rows):
        top = HEAD + rank * (ROW + GAP)
        _text(svg, f"rank {rank}", MARGIN, top + ROW / 2 + 4)
        line = SubElement(svg, "g", transform=f"translate({_px(MARGIN + LABEL)} {_px(top)})")
        SubElement(line, "rect", {"class": "idle"}, width=_px(width), height=_px(ROW), fill=IDLE)
        for box in row:
            lightness = _lightness(box.stage // len(rows), stages)
            _box(line, box, (box.start - begin) * scale, scale, lightness, numbers=numbers)
    _axis(svg, HEAD + height, begin, end, scale, unit)
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _page(width: float, height: float) -> Element:
    page = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_px(width)} {_px(height)}",
            "width": _px(width),
            "height": _px(height),
            "font-family": "Helvetica, Arial, sans-serif",
            "font-size": "12",
        },
    )
    SubElement(page, "rect", width="100%", height="100%", fill="white")
    return page


def _box(
    line: Element, box: Computation, left: float, scale: float, lightness: float, *, numbers: bool
) -> None:
    width = (box.stop - box.start) * scale
    edge = min(0.5, width / 8)  # white on either side, so that neighbours of one colour are two
    rect = SubElement(
        line,
        "rect",
        {"class": box.kind},
        x=_px(left + edge),
        width=_px(width - 2 * edge),
        height=_px(ROW),
        fill=_colour(box.kind, lightness),
    )
    SubElement(rect, "title").text = (
        f"{box.kind}, stage {box.stage}, micro-batch {box.micro_batch}: "
        f"{box.start:.6g} to {box.stop:.6g}"
    )
    number = str(box.micro_batch)
    if numbers and len(number) * DIGIT <= width:
        fill = "#222" if lightness > 55 else "white"
        middle = left + width / 2
        _text(line, number, middle, ROW / 2 + 4, size=BOX_SIZE, anchor="middle", fill=fill)


def _lightness(virtual_stage: int, stages: int) -> float:
    """Percent; from light, the first virtual stage, to dark."""
    return 68.0 if stages == 1 else 82 - 44 * virtual_stage / (stages - 1)


def _colour(kind: str, lightness: float) -> str:
    # As #rrggbb: not every viewer knows hsl().
    rgb = hls_to_rgb(HUES[kind] / 360, lightness / 100, 0.75)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _legend(svg: Element, stages: int, kinds: Sequence[str]) -> None:
    left = MARGIN + LABEL
    for kind in kinds:
        _text(svg, kind, left, 53)
        left += 7 * len(kind) + 8
        for virtual_stage in range(stages):
            _swatch(svg, left, _colour(kind, _lightness(virtual_stage, stages)))
            left += 14
        left += 18
    _text(svg, "idle", left, 53)
    _swatch(svg, left + 30, IDLE)
    if stages > 1:
        note = f"light to dark: a rank's virtual stages 0 to {stages - 1}"
        _text(svg, note, left + 68, 53, fill="#666")


def _swatch(svg: Element, left: float, colour: str) -> None:
    SubElement(svg, "rect", x=_px(left), y="43", width="13", height="13", fill=colour)


def _axis(svg: Element, top: float, begin: float, end: float, scale: float, unit: str) -> None:
    left = MARGIN + LABEL
    for tick in _ticks(begin, end, scale):
        x = left + (tick - begin) * scale
        ends = {"x1": _px(x), "x2": _px(x), "y1": _px(top), "y2": _px(top + 5)}
        SubElement(svg, "line", ends, stroke="#888")
        _text(svg, f"{tick:g}", x, top + 18, anchor="middle", fill="#444")
    _text(svg, f"time in {unit}", left, top + 36, fill="#444")


def _ticks(begin: float, end: float, scale: float) -> Iterator[float]:
    """Round times, 80 pixels apart or more."""
    least = 80 / scale
    power = 10 ** math.floor(math.log10(least))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= least)
    for n in range(math.ceil(begin / step), math.floor(end / step) + 1):
        yield n * step


def _text(
    parent: Element,
    text: str,
    x: float,
    y: float,
    *,
    size: int | None = None,
    weight: str | None = None,
    anchor: str | None = None,
    fill: str = "#222",
) -> None:
    style = {"font-size": size, "font-weight": weight, "text-anchor": anchor}
    given = {name: str(value) for name, value in style.items() if value is not None}
    SubElement(parent, "text", given, x=_px(x), y=_px(y), fill=fill).text = text


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
