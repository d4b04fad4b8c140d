import errno
import os

import pytest

from megallama.config.schema import MetricsConfig, WandbConfig
from megallama.observe.console import ConsoleSink
from megallama.observe.jsonl import read_metrics
from megallama.observe.jsonl_sink import JsonlSink
from megallama.observe.sinks import Fanout, MessageSink, observers
from megallama.observe.wandb_sink import WandbSink
from tests.observe.samples import EVAL, INFO, step

NO_WANDB = MetricsConfig(wandb=WandbConfig(mode="disabled"))
QUIET = NO_WANDB.model_copy(update={"console": False})


class Recorder:
    """Remembers its calls, and raises in one of them."""

    def __init__(self, name="", log=None, fails_at=None):
        self.name, self.fails_at = name, fails_at
        self.log = log if log is not None else []

    def _called(self, event, value):
        if event == self.fails_at:
            raise RuntimeError("out of paint")
        self.log.append((self.name, event, value) if self.name else (event, value))

    def start(self, info):
        self._called("start", info)

    def step(self, record):
        self._called("step", record)

    def evaluation(self, record):
        self._called("evaluation", record)

    def message(self, text):
        self._called("message", text)

    def close(self, ok):
        self._called("close", ok)


def drive(fanout):
    fanout.start(INFO)
    fanout.step(step(1))
    fanout.evaluation(EVAL)
    fanout.message("hello")
    fanout.step(step(2))
    fanout.close(True)


ALL = [
    ("start", INFO),
    ("step", step(1)),
    ("evaluation", EVAL),
    ("message", "hello"),
    ("step", step(2)),
    ("close", True),
]


def test_every_call_reaches_every_observer():
    one, two = Recorder(), Recorder()
    drive(Fanout([one, two]))
    assert one.log == two.log == ALL


@pytest.mark.parametrize("event", ["start", "step", "evaluation", "message", "close"])
def test_an_observer_that_raises_is_reported_once_and_dropped(event, capsys):
    before, broken, after = Recorder(), Recorder(fails_at=event), Recorder()
    drive(Fanout([before, broken, after]))
    assert before.log == after.log == ALL
    reached = [name for name, _ in ALL].index(event)
    rest = [] if event == "close" else [("close", False)]
    assert broken.log == ALL[:reached] + rest
    errors = capsys.readouterr().err
    assert errors.count("Recorder") == errors.count("out of paint") == 1
    assert event in errors


def test_the_screen_is_closed_last():
    log = []
    fanout = Fanout([Recorder("screen", log), Recorder("file", log)])
    fanout.start(INFO)
    fanout.close(False)
    assert [entry[0] for entry in log] == ["screen", "file", "file", "screen"]


def test_a_keyboard_interrupt_is_not_swallowed():
    class Interrupted(Recorder):
        def step(self, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Fanout([Interrupted()]).step(step(1))


def test_which_observers(tmp_path):
    def kinds(config):
        return [type(observer) for observer in observers(config, tmp_path, resumed=False)]

    assert kinds(NO_WANDB) == [ConsoleSink, JsonlSink]
    assert kinds(QUIET) == [MessageSink, JsonlSink]
    assert kinds(MetricsConfig(wandb=WandbConfig(mode="offline")))[-1] is WandbSink


def test_without_a_console_only_messages_are_shown(tmp_path, capsys):
    drive(Fanout(observers(QUIET, tmp_path, resumed=False)))
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "hello\n")


def full_disk(fd, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_loudly_on_the_screen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "write", full_disk)
    drive(Fanout(observers(NO_WANDB, tmp_path, resumed=False)))
    shown = capsys.readouterr().out
    assert shown.count("!!! CANNOT WRITE") == 1
    assert shown.count("LOST") == 1
    assert shown.index("CANNOT WRITE") < shown.index("LOST") < shown.index("done:")


def test_a_broken_screen_takes_nothing_else_down(tmp_path, capsys, monkeypatch):
    class ClosedPipe:
        encoding = "utf-8"

        def isatty(self):
            return False

        def write(self, text):
            raise BrokenPipeError("nobody reads")

    monkeypatch.setattr("sys.stdout", ClosedPipe())
    chosen = observers(NO_WANDB, tmp_path, resumed=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        fanout = Fanout(chosen)
        fanout.start(INFO)
        fanout.step(step(1))
    fanout.step(step(2))
    fanout.close(True)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    errors = capsys.readouterr().err
    assert errors.count("ConsoleSink") == 1
    assert "CANNOT WRITE" in errors
