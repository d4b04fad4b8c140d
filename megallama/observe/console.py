"""The run on a screen: what runs, a line a step, how long it still takes, and how it went.

On a terminal there are colours and a progress bar below the lines; elsewhere (a log file, CI) the
same lines come without control characters, 100 columns wide.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from megallama.observe import columns
from megallama.observe.record import EvalRecord, RunInfo, StepRecord

PLAIN_WIDTH = 100
LINES_BETWEEN_TITLES = 25
REFRESH_S = 0.1


class ConsoleSink:
    """Prints to `file`, standard output by default."""

    def __init__(self, every: int, file: TextIO | None = None) -> None:
        self._every = every
        self._file = file or sys.stdout
        terminal = self._file.isatty()
        self._rich = Console(file=self._file) if terminal else None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._refreshed = 0.0
        self._lines = 0
        self._first: StepRecord | None = None
        self._last: StepRecord | None = None
        self._last_eval: EvalRecord | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._info: RunInfo | None = None

    def start(self, info: RunInfo) -> None:
        """Show what runs."""
        self._info = info
        title, facts = describe(info)
        if self._rich is None:
            self._print("\n".join([title, *(f"  {fact}" for fact in facts)]))
        else:
            self._rich.print(Panel(Text("\n".join(facts)), title=Text(title, "bold"), expand=False))

    def step(self, record: StepRecord) -> None:
        """Print a line if it is this step's turn, and move the bar."""
        first = self._first is None
        self._first = self._first or record
        self._last = record
        self._tokens += record.batch_tokens
        self._seconds += record.step_time_s
        left = time_left(self._first, record)
        if first or record.step % self._every == 0 or record.step == record.steps:
            shown = columns.fitting(self._width())
            if self._lines % LINES_BETWEEN_TITLES == 0:
                self._print(columns.header(shown), "dim")
            self._print(columns.line(shown, columns.Row(record, left)))
            self._lines += 1
        self._move_bar(record, left)

    def evaluation(self, record: EvalRecord) -> None:
        """Print the held-out loss under the step's."""
        self._last_eval = record
        self._print(columns.evaluation_line(columns.fitting(self._width()), record), "cyan")

    def message(self, text: str) -> None:
        """Print a line between the steps."""
        self._print(f"* {text}", "yellow")

    def close(self, ok: bool) -> None:
        """Take the bar away and say how it went."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._info is None:
            return
        self._print(self._outcome(ok), "bold green" if ok else "bold red")
        folder = Path(self._info.run_folder)
        self._print(f"  {folder / 'metrics.jsonl'}   {folder / 'checkpoints'}")

    def _outcome(self, ok: bool) -> str:
        verdict = "done" if ok else "stopped"
        if self._first is None or self._last is None:
            return f"{verdict}: no step was taken"
        parts = [
            f"{verdict}: step {self._last.step} of {self._last.steps}",
            f"loss {self._first.loss:.4f} -> {self._last.loss:.4f}",
            f"{columns.count(self._tokens)} tokens in {columns.duration(self._seconds)}",
            f"{columns.count(self._tokens / self._seconds)} tok/s",
        ]
        if self._last_eval is not None:
            parts.insert(2, f"held-out {self._last_eval.loss:.4f}")
        return ", ".join(parts)

    def _width(self) -> int:
        return PLAIN_WIDTH if self._rich is None else min(PLAIN_WIDTH, self._rich.width)

    def _print(self, text: str, style: str = "") -> None:
        if self._rich is not None:
            self._rich.print(Text(text, style))
            return
        encoding = self._file.encoding or "utf-8"
        # A log under LANG=C cannot take every character; a question mark is better than no log.
        self._file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._file.flush()

    def _move_bar(self, record: StepRecord, left: float | None) -> None:
        if self._rich is None:
            return
        if self._progress is None:
            self._progress = progress_bar(self._rich)
            self._task = self._progress.add_task("", total=record.steps, left="", tokens="")
            self._progress.start()
            self._rich.show_cursor(True)  # a killed run should not leave a terminal without one
        now = time.monotonic()
        # A fast model takes hundreds of steps a second, and drawing would slow it.
        if now - self._refreshed < REFRESH_S and record.step < record.steps:
            return
        self._refreshed = now
        self._progress.update(
            self._task,
            completed=record.step,
            tokens=columns.count(record.tokens),
            left=columns.duration(left),
            refresh=True,
        )


def progress_bar(screen: Console) -> Progress:
    """A bar that is drawn only when told to: no thread runs beside the training."""
    return Progress(
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[tokens]} tokens"),
        TextColumn("{task.fields[left]} left"),
        console=screen,
        auto_refresh=False,
        transient=True,
        expand=True,
    )


def time_left(first: StepRecord, last: StepRecord) -> float | None:
    """Seconds until the last step at the pace since `first`, checkpoints and evaluations included.

    None after one step: its own length says little, for it carries compilation.
    """
    if last.step <= first.step:
        return None
    pace = (last.timestamp - first.timestamp) / (last.step - first.step)
    return pace * (last.steps - last.step)


def describe(info: RunInfo) -> tuple[str, list[str]]:
    """A title and the lines below it: what runs, where, on what."""
    peak = (
        "peak unknown: no MFU"
        if info.peak_flops is None
        else f"peak {info.peak_flops / 1e12:.0f} TFLOP/s each"
    )
    facts = [
        f"layout  {info.layout}",
        f"device  {info.world_size} x {info.device} ({peak})",
        f"data    {info.data}",
        *([f"kernels {info.kernels}"] if info.kernels else []),
        f"run     {info.run_folder}",
    ]
    if info.resumed_step:
        facts.append(f"resumed after step {info.resumed_step}")
    return f"MegaLlama {info.model}, {columns.count(info.parameters)} parameters", facts
