import io
import re
import sys
from dataclasses import replace

import pytest

from megallama.observe.console import ConsoleSink, time_left
from tests.observe.samples import EVAL, INFO, step

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(file):
    return file.getvalue().splitlines()


def run(file, numbers=range(1, 7), every=1, total=6):
    sink = ConsoleSink(every, file)
    sink.start(INFO)
    for number in numbers:
        sink.step(step(number, steps=total, loss=10.0 / number))
    return sink


def step_numbers(file):
    return [int(line.split()[0]) for line in lines(file) if re.match(r" *\d+  ", line)]


def test_a_log_has_plain_lines_that_fit_and_align():
    file = io.StringIO()
    sink = run(file)
    sink.evaluation(EVAL)
    sink.message("saved checkpoint step 6")
    sink.close(True)
    text = file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert max(map(len, lines(file))) <= 100
    titles = next(n for n, line in enumerate(lines(file)) if "loss" in line.split())
    rows = lines(file)[titles : titles + 7]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert re.search(r"^\* saved checkpoint step 6$", text, re.M)


def test_the_header_says_what_runs():
    file = io.StringIO()
    ConsoleSink(1, file).start(replace(INFO, resumed_step=40, peak_flops=989e12))
    text = file.getvalue()
    for part in ("tiny", "1.23M", "TP2 · PP1 · DP1", "2 x a device", "989 TFLOP/s", "stdlib"):
        assert part in text
    assert "runs/sample" in text
    assert "resumed after step 40" in text


def test_an_unknown_device_is_said_once():
    file = io.StringIO()
    run(file).close(True)
    assert file.getvalue().count("no MFU") == 1


def test_unknown_values_are_dashes():
    file = io.StringIO()
    run(file, numbers=[1])
    title, row = (line.split() for line in lines(file)[-2:])
    values = dict(zip(title, row, strict=True))
    assert values["MFU"] == values["bit/B"] == values["left"] == "-"
    assert values["loss"] == "10.0000"


def test_every_n_steps_and_the_first_and_the_last():
    file = io.StringIO()
    run(file, numbers=range(12, 33), every=10, total=32)
    assert step_numbers(file) == [12, 20, 30, 32]


def test_titles_come_again_in_a_long_run():
    file = io.StringIO()
    run(file, numbers=range(1, 61), total=100)
    assert sum("loss" in line.split() for line in lines(file)) == 3


def test_the_summary():
    file = io.StringIO()
    sink = run(file)
    sink.evaluation(EVAL)
    sink.close(True)
    done, places = lines(file)[-2:]
    assert done.startswith("done: step 6 of 6, loss 10.0000 -> 1.6667, held-out 5.5000")
    assert "6.00k tokens in 3.0s, 2.00k tok/s" in done
    assert "runs/sample/metrics.jsonl" in places
    assert "runs/sample/checkpoints" in places


def test_the_summary_of_a_run_that_failed_and_of_one_without_steps():
    file = io.StringIO()
    run(file, numbers=[1, 2]).close(False)
    assert "stopped: step 2 of 6" in file.getvalue()
    file = io.StringIO()
    run(file, numbers=[]).close(True)
    assert "no step was taken" in file.getvalue()


def test_a_log_that_cannot_take_every_character_is_still_written():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    run(file).close(True)
    assert b"TP2 ? PP1 ? DP1" in raw.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_terminal_shows_the_same_and_a_bar_in_its_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    sink = run(file, total=8)
    sink.step(step(8, steps=8))
    shown = [CONTROL.sub("", line) for line in lines(file)]
    assert max(map(len, shown)) <= width
    assert any(re.search(r"8/8 +8.00k tokens", line) for line in shown)
    sink.close(True)
    assert "done: step 8 of 8" in CONTROL.sub("", file.getvalue())


def test_a_terminal_keeps_its_cursor_and_its_standard_output(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    before = sys.stdout
    file = Terminal()
    sink = run(file)
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
    sink.close(True)
    assert sys.stdout is before


def test_text_is_never_taken_for_markup(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for file in (io.StringIO(), Terminal()):
        sink = ConsoleSink(1, file)
        sink.start(replace(INFO, run_folder="runs/[red]x[/]"))
        sink.message("[/nothing] closes")
        assert "runs/[red]x[/]" in file.getvalue()
        assert "[/nothing] closes" in file.getvalue()


def test_time_left_is_the_pace_since_the_first_line_times_what_remains():
    first = step(5, steps=25, timestamp=100.0)
    assert time_left(first, first) is None
    assert time_left(first, step(15, steps=25, timestamp=130.0)) == pytest.approx(30.0)
    assert time_left(first, step(25, steps=25, timestamp=160.0)) == 0.0
