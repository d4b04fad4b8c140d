"""Reading what a run measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from megallama.config.errors import UserError
from megallama.observe.picture import Computation
from megallama.observe.timeline_reader import read_timeline


def line(step: int = 1, pipeline: int = 0, **other: Any) -> dict[str, Any]:
    usual = {"kind": "forward", "stage": pipeline, "micro_batch": 0, "start_s": 0.5, "stop_s": 0.75}
    return {"step": step, "attempt": 1, "pipeline": pipeline} | usual | other


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "timeline.jsonl").write_text(text)
    return folder


def test_the_last_step_by_rank(tmp_path: Path):
    run = write(tmp_path, line(1), line(2, 1), line(2, 0), line(2, 0, kind="backward"))
    step, rows = read_timeline(run)
    assert step == 2
    assert rows == [
        [Computation("forward", 0, 0, 0.5, 0.75), Computation("backward", 0, 0, 0.5, 0.75)],
        [Computation("forward", 1, 0, 0.5, 0.75)],
    ]


def test_a_step_that_is_asked_for(tmp_path: Path):
    run = write(tmp_path, line(1, start_s=0), line(2))
    assert read_timeline(run, 1) == (1, [[Computation("forward", 0, 0, 0, 0.75)]])


def test_a_step_that_was_done_again_counts_as_it_was_last(tmp_path: Path):
    other_layout = line(1, 1)
    run = write(tmp_path, line(1), other_layout, line(2), line(1, stop_s=9.0, attempt=2))
    assert read_timeline(run) == (1, [[Computation("forward", 0, 0, 0.5, 9.0)]])


def test_a_line_that_a_crash_tore_is_left_out(tmp_path: Path):
    run = write(tmp_path, line(1))
    with (run / "timeline.jsonl").open("a") as file:
        file.write('{"step": 1, "pipe')
    assert len(read_timeline(run)[1][0]) == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"stop_s": 0.25}, "stop_s: 0.25 is before start_s, 0.5"),
        ({"start_s": "soon"}, "start_s: 'soon' is no number of seconds"),
        ({"stop_s": float("nan")}, "stop_s: nan is no number of seconds"),
        ({"kind": "sideways"}, "kind: 'sideways' is not forward or backward"),
        ({"stage": -1}, "stage: -1 is no count from 0"),
        ({"micro_batch": None}, "micro_batch: None is no count from 0"),
    ],
)
def test_a_line_that_is_wrong(wrong: dict[str, Any], says: str, tmp_path: Path):
    run = write(tmp_path, line(), line(**wrong))
    with pytest.raises(UserError) as error:
        read_timeline(run)
    assert str(error.value) == f"{run}/timeline.jsonl:2: {says}"


def test_files_without_a_step(tmp_path: Path):
    with pytest.raises(UserError, match="measured no timeline; `megallama draw "):
        read_timeline(tmp_path)
    with pytest.raises(UserError, match="no step was written yet"):
        read_timeline(write(tmp_path))
    with pytest.raises(UserError, match=r"step 7 is not in .*: use 2 or 4"):
        read_timeline(write(tmp_path, line(2), line(4)), 7)
    (tmp_path / "timeline.jsonl").write_text("no\njson\n")
    with pytest.raises(UserError, match=r"timeline.jsonl:1: not a JSON object"):
        read_timeline(tmp_path)
