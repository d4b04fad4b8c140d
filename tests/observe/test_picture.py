"""The picture of a pipeline's step: valid, complete, readable."""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from megallama.observe.picture import Computation, pipeline_svg

SVG = "{http://www.w3.org/2000/svg}"

TWO_RANKS = [  # 1F1B, two micro-batches: 6 of 18 units are idle
    [
        Computation("forward", 0, 0, 0, 1),
        Computation("forward", 0, 1, 1, 2),
        Computation("backward", 0, 0, 4, 6),
        Computation("backward", 0, 1, 7, 9),
    ],
    [
        Computation("forward", 1, 0, 1, 2),
        Computation("backward", 1, 0, 2, 4),
        Computation("forward", 1, 1, 4, 5),
        Computation("backward", 1, 1, 5, 7),
    ],
]


def looped(ranks: int, stages: int, micro_batches: int) -> list[list[Computation]]:
    """Forwards only, one after the other."""
    order = [(v, m) for v in range(stages) for m in range(micro_batches)]
    return [
        [
            Computation("forward", v * ranks + r, m, k + r, k + r + 1)
            for k, (v, m) in enumerate(order)
        ]
        for r in range(ranks)
    ]


def draw(rows: list[list[Computation]], title: str = "a title", unit: str = "ms") -> Element:
    return ElementTree.fromstring(pipeline_svg(rows, title, unit))


def boxes(svg: Element, kind: str) -> list[Element]:
    return svg.findall(f".//{SVG}rect[@class='{kind}']")


def texts(parent: Element) -> list[str]:
    return [text.text or "" for text in parent.iter(f"{SVG}text")]


def test_a_box_for_each_computation_where_its_time_says():
    svg = draw(TWO_RANKS)
    rows = svg.findall(f"{SVG}g")
    assert len(rows) == len(TWO_RANKS)
    for row, computations in zip(rows, TWO_RANKS, strict=True):
        idle, *drawn = row.findall(f"{SVG}rect")
        unit = float(idle.get("width", "")) / 9
        assert [box.get("class") for box in drawn] == [c.kind for c in computations]
        for box, computation in zip(drawn, computations, strict=True):
            left, width = float(box.get("x", "")), float(box.get("width", ""))
            assert left == pytest.approx(computation.start * unit, abs=1)
            assert width == pytest.approx((computation.stop - computation.start) * unit, abs=2)


def test_labels():
    svg = draw(TWO_RANKS, "Schedule <1F1B> & friends\x01", "ms")
    labels = texts(svg)
    assert labels[0] == "Schedule <1F1B> & friends. Bubble: 33.3 % of the ranks' time"
    assert {"rank 0", "rank 1", "forward", "backward", "idle", "time in ms"} <= set(labels)
    assert [texts(row) for row in svg.findall(f"{SVG}g")] == [list("0101"), list("0011")]
    tips = [tip.text for tip in svg.iter(f"{SVG}title")]
    assert tips[2] == "backward, stage 0, micro-batch 0: 4 to 6"
    assert {"0", "2", "4", "6", "8"} <= set(labels), "an axis with round times"


def test_time_begins_with_the_first_computation():
    late = [[c._replace(start=c.start + 100, stop=c.stop + 100) for c in row] for row in TWO_RANKS]
    svg = draw(late)
    assert "33.3 %" in texts(svg)[0]
    assert {"100", "108"} <= set(texts(svg))
    assert float(boxes(svg, "forward")[0].get("x", "")) < 1


def test_virtual_stages_are_shades_of_one_hue():
    svg = draw(looped(2, 3, 2))
    colours = {box.get("fill") for box in boxes(svg, "forward")}
    assert len(colours) == 3
    assert "light to dark: a rank's virtual stages 0 to 2" in texts(svg)
    assert "backward" not in texts(svg), "the legend has what is drawn"


def test_two_kinds_never_share_a_colour():
    svg = draw(TWO_RANKS)
    colours = [{box.get("fill") for box in boxes(svg, kind)} for kind in ("forward", "backward")]
    assert colours[0].isdisjoint(colours[1])


@pytest.mark.parametrize(
    ("ranks", "stages", "micro_batches", "numbered"),
    [(4, 1, 8, True), (4, 2, 8, True), (16, 8, 16, False)],
)
def test_numbers_where_they_can_be_read(
    ranks: int, stages: int, micro_batches: int, numbered: bool
):
    svg = draw(looped(ranks, stages, micro_batches))
    assert len(boxes(svg, "forward")) == ranks * stages * micro_batches
    assert bool(texts(svg.findall(f"{SVG}g")[0])) is numbered
    assert float(svg.get("width", "")) < 2000


def test_nothing_is_loaded_from_elsewhere():
    text = pipeline_svg(TWO_RANKS, "a title", "ms")
    assert "href" not in text
    assert "url(" not in text
    assert text.count("http") == 1, "the name space"
