"""`megallama draw`, through the real command."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megallama import cli
from tests.cli.mistakes import YAML

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(YAML)
    return path


def drawn(folder: Path, *arguments: str) -> tuple[str, int]:
    """The title of the picture, and how many computations it shows."""
    output = folder / "step.svg"
    assert cli.main(["draw", *arguments, "--output", str(output)]) == 0
    svg = ElementTree.parse(output).getroot()
    title = svg.find(f"{SVG}text")
    assert title is not None
    boxes = [
        rect for rect in svg.iter(f"{SVG}rect") if rect.get("class") in ("forward", "backward")
    ]
    return title.text or "", len(boxes)


def test_a_config_as_planned(config: Path, tmp_path: Path):
    title, boxes = drawn(tmp_path, str(config), "layout.pipeline=2", "layout.data_shard=2")
    assert title.startswith("my: 1f1b, pipeline 2, micro-batches 4. Bubble: ")  # 256 / (32 · 2)
    assert boxes == 2 * 2 * 4


def test_virtual_stages_and_groups(config: Path, tmp_path: Path):
    layout = ["pipeline=2", "virtual_stages=2", "schedule=interleaved_1f1b", "micro_batch_group=4"]
    overrides = ["model.layers=4", *(f"layout.{key}" for key in layout)]
    title, boxes = drawn(tmp_path, str(config), *overrides)
    assert (
        "interleaved_1f1b, pipeline 2 × 2 virtual stages, micro-batches 8 in groups of 4" in title
    )
    assert boxes == 2 * 4 * 8


def test_the_bubble_of_stages_that_cost_the_same_is_the_formula(config: Path, tmp_path: Path):
    """Two stages of 50 blocks, beside which embedding and head are little: (2-1) / 8 of busy."""
    title, _ = drawn(tmp_path, str(config), "layout.pipeline=2", "model.layers=100")
    said = float(title.split("Bubble: ")[1].split(" %")[0]) / 100
    assert said == pytest.approx(1 / 9, abs=0.02)


def test_llama_3_405b(tmp_path: Path):
    title, boxes = drawn(tmp_path, "llama3_405b_16384gpu", "layout.virtual_stages=8")
    assert "pipeline 16 × 8 virtual stages, micro-batches 16 in groups of 16" in title
    assert boxes == 2 * 128 * 16


def test_a_run_as_measured(tmp_path: Path):
    run = tmp_path / "my_run"
    run.mkdir()
    with (run / "timeline.jsonl").open("w") as file:
        for step in (1, 2):
            for rank in (0, 1):
                times = {"start_s": 0.25 * rank, "stop_s": 0.25 * (rank + 1)}
                line = {
                    "step": step,
                    "attempt": 1,
                    "pipeline": rank,
                    "kind": "forward",
                    "stage": rank,
                }
                file.write(json.dumps(line | {"micro_batch": 0} | times) + "\n")
    assert drawn(tmp_path, str(run)) == (
        "my_run, step 2 as measured. Bubble: 50.0 % of the ranks' time",
        2,
    )
    assert "step 1 as measured" in drawn(tmp_path, str(run), "--step", "1")[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["my.yaml", "--output", "step.png"], "--output: step.png is no SVG: use step.svg"),
        (["my.yaml", "--output", "no/step.svg"], "--output: no/step.svg cannot be written"),
        (["my.yaml", "--step", "3"], "--step: 3 is a step that was measured, and my.yaml is a"),
        (["nosuch"], "nosuch: no such file"),
        (["."], "timeline.jsonl: the run measured no timeline; `megallama draw config.yaml` draws"),
        ([".", "layout.pipeline=2"], "layout.pipeline=2 changes a config, and . is a run folder"),
        (["my.yaml", "layout.pipeline=3"], "layout.pipeline: 3 ranks are more than model.layers"),
        (
            ["my.yaml", "train.global_batch_tokens=640000"],
            "train.global_batch_tokens: 20000 micro-batches on each data rank are 40000 boxes",
        ),
        (["my.yaml", "layout.data_shard=3"], "train.global_batch_tokens: 256 is not a multiple"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str],
    says: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(config.parent)
    output = [] if "--output" in arguments else ["--output", "step.svg"]
    assert cli.main(["draw", *arguments, *output]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert len(printed.err.splitlines()) <= 5
    assert not list(config.parent.glob("**/*.svg"))


def test_too_many_micro_batches_are_told_how_many_can_be_drawn(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    many = [str(config), "train.global_batch_tokens=640000", "layout.pipeline=2"]
    assert cli.main(["draw", *many, "--output", str(tmp_path / "step.svg")]) == 2
    (fits,) = [
        w for w in capfd.readouterr().err.split() if w.startswith("train.global_batch_tokens=")
    ]
    assert drawn(tmp_path, *many, fits)[1] == 20_000
