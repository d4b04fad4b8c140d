import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.observe import jsonl
from megallama.observe.jsonl import loss_curve, read_metrics
from megallama.observe.jsonl_sink import JsonlSink
from tests.observe.samples import EVAL, INFO, STEP, step

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def write(path, *records, said=None):
    sink = JsonlSink(path, (said if said is not None else []).append)
    sink.start(INFO)
    for record in records:
        sink.step(record)
    sink.close(True)


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def test_a_line_holds_every_field(path):
    sink = JsonlSink(path, print)
    sink.step(STEP)
    sink.evaluation(EVAL)
    sink.close(True)
    first, second = read_metrics(path)
    assert first == {"kind": "step"} | vars(STEP)
    assert second == {"kind": "eval"} | vars(EVAL)


def test_each_line_is_there_before_the_next_step(path):
    sink = JsonlSink(path, print)
    for number in (1, 2, 3):
        sink.step(step(number))
        assert steps(path)[-1] == number


def test_what_is_not_finite_is_valid_json_and_comes_back(path):
    write(path, step(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert (raw["loss"], raw["grad_norm"], raw["lr"]) == ("NaN", "Infinity", "-Infinity")
    (row,) = read_metrics(path)
    assert math.isnan(row["loss"])
    assert (row["grad_norm"], row["lr"]) == (math.inf, -math.inf)


def test_a_tail_torn_at_any_byte_is_mended_and_nothing_else_is_lost(path):
    write(path, step(1), step(2))
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(second, len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = cut >= len(whole) - 1
        kept = [1, 2] if complete else [1]
        assert steps(path) == kept, cut
        write(path, step(3))
        assert steps(path) == [*kept, 3], cut
        assert path.read_bytes().startswith(whole if complete else whole[:second])


@pytest.mark.parametrize("tail", [b"\0" * 700, b'{"kind": "st' + b"\0" * 80 + b'": 1}\n', b"}"])
def test_what_a_power_cut_leaves_is_removed(path, tail):
    write(path, step(1))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert steps(path) == [1]
    write(path, step(2))
    assert steps(path) == [1, 2]
    assert path.read_bytes().startswith(whole)


def test_a_torn_line_longer_than_a_block_is_removed(path, monkeypatch):
    write(path, step(1), step(2))
    path.write_bytes(path.read_bytes() + b'{"kind": "step", "x": "' + b"y" * 1000)
    monkeypatch.setattr(jsonl, "BLOCK", 64)
    write(path, step(3))
    assert steps(path) == [1, 2, 3]


@pytest.mark.parametrize("content", [b"", b'{"kind": "st'])
def test_a_file_without_a_whole_line(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    assert read_metrics(path) == []
    write(path, step(1))
    assert steps(path) == [1]


def test_damage_in_the_middle_is_an_error_that_names_the_line(path):
    write(path, step(1), step(2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[1])
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_a_killed_writer_loses_nothing_it_wrote(path):
    program = f"""
import sys
from pathlib import Path
from megallama.observe.jsonl_sink import JsonlSink
from tests.observe.samples import step
sink = JsonlSink(Path({str(path)!r}), print)
for number in range(1, 10**6):
    sink.step(step(number))
    print(number, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as writer:
        for _ in range(25):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
    found = steps(path)
    assert len(found) >= acknowledged
    assert found == list(range(1, len(found) + 1))


def test_a_full_disk_is_said_once_and_no_line_is_lost_once_there_is_room(path, monkeypatch):
    real_write, said = os.write, []

    def half_a_line_then_full(fd, data):
        if len(data) < 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(fd, data[: len(data) // 2])

    sink = JsonlSink(path, said.append)
    sink.step(step(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_a_line_then_full)
        sink.step(step(2))
        sink.step(step(3))
        assert steps(path) == [1]
        assert len(said) == 1
        assert "CANNOT WRITE" in said[0]
        assert "No space left" in said[0]
        assert str(path) in said[0]
    sink.step(step(4))
    assert steps(path) == [1, 2, 3, 4]
    assert len(said) == 2
    assert "written again" in said[1]
    sink.close(True)
    assert len(said) == 2


def test_a_failed_fsync_leaves_no_line_twice(path, monkeypatch):
    def fail(fd):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    sink = JsonlSink(path, lambda text: None)
    sink.step(step(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        sink.step(step(2))
        sink.step(step(3))
    sink.step(step(4))
    assert steps(path) == [1, 2, 3, 4]


def test_a_file_that_may_not_grow_says_how_much_is_lost(path):
    said: list[str] = []
    sink = JsonlSink(path, said.append)
    sink.step(step(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, limits[1]))
    try:
        sink.step(step(2))
        sink.step(step(3))
        sink.close(True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(path) == [1]
    assert len(said) == 2
    assert "2 lines" in said[1]
    assert "LOST" in said[1]


def test_loss_curve_follows_the_run_that_stands(path):
    write(path, *(step(n, attempt=0, loss=float(n)) for n in (1, 2, 3, 4, 5, 6)))
    write(path, *(step(n, attempt=1, loss=10.0 * n) for n in (4, 5)))
    curve = loss_curve(path)
    assert curve == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0}
    assert list(curve) == [1, 2, 3, 4, 5]
    assert steps(path) == [1, 2, 3, 4, 5, 6, 4, 5]


def test_loss_curve_leaves_evaluations_out(path):
    sink = JsonlSink(path, print)
    sink.step(step(1))
    sink.evaluation(EVAL)
    sink.close(True)
    assert loss_curve(path) == {1: STEP.loss}
