"""Which observers a run has, and one that stands for them all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from megallama.config.schema import MetricsConfig
from megallama.observe.console import ConsoleSink
from megallama.observe.jsonl_sink import JsonlSink
from megallama.observe.record import EvalRecord, Observer, RunInfo, StepRecord
from megallama.observe.wandb_mode import find_wandb
from megallama.observe.wandb_sink import WandbSink


class MessageSink:
    """Messages on standard error, where there is no console: some ask for help."""

    def start(self, info: RunInfo) -> None:
        """Nothing to show."""

    def step(self, record: StepRecord) -> None:
        """Nothing to show."""

    def evaluation(self, record: EvalRecord) -> None:
        """Nothing to show."""

    def close(self, ok: bool) -> None:
        """Nothing to show."""

    def message(self, text: str) -> None:
        """Print it."""
        warn(text)


class Fanout:
    """Passes every call on. An observer that raises is reported and dropped; training goes on."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._live = list(observers)

    def start(self, info: RunInfo) -> None:
        """Pass it on."""
        self._each("start", lambda observer: observer.start(info))

    def step(self, record: StepRecord) -> None:
        """Pass it on."""
        self._each("step", lambda observer: observer.step(record))

    def evaluation(self, record: EvalRecord) -> None:
        """Pass it on."""
        self._each("evaluation", lambda observer: observer.evaluation(record))

    def message(self, text: str) -> None:
        """Pass it on."""
        self._each("message", lambda observer: observer.message(text))

    def close(self, ok: bool) -> None:
        """Pass it on, the first observer last: the others' last words are shown on it."""
        self._live.reverse()
        self._each("close", lambda observer: observer.close(ok))
        self._live.clear()

    def _each(self, event: str, call: Callable[[Observer], None]) -> None:
        for observer in tuple(self._live):
            try:
                call(observer)
            except Exception as error:
                self._live.remove(observer)
                with contextlib.suppress(Exception):  # it may hold the terminal
                    observer.close(False)
                name = type(observer).__name__
                warn(f"{name} failed at {event} and is off from here on: {error!r}")


def observers(config: MetricsConfig, run_folder: Path, resumed: bool) -> list[Observer]:
    """The observers of a run, for the one rank that has the loss; the one people read is first.

    Raises UserError if wandb is asked for by name and not installed.
    """
    screen: Observer = ConsoleSink(config.every) if config.console else MessageSink()

    def say(text: str) -> None:
        try:
            screen.message(text)
        except Exception:  # a broken screen must not take down the sink that has something to say
            warn(text)

    chosen: list[Observer] = [screen, JsonlSink(run_folder / "metrics.jsonl", say)]
    wandb = find_wandb(config.wandb)
    if wandb is not None:
        chosen.append(WandbSink(wandb, config.wandb, run_folder, resumed, say))
    return chosen


def warn(text: str) -> None:
    """Say it on standard error, whatever became of it."""
    with contextlib.suppress(OSError, ValueError):  # closed, or a pipe nobody reads
        print(text, file=sys.stderr, flush=True)
