"""Small runs through the real command, and what they left behind."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from megallama_launch.local import run_local
from megallama_launch.outcome import Outcome

from megallama.cli import main
from megallama.observe.jsonl import read_metrics

YAML = """\
model: {hidden: 32, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, ffn: 64, vocab: 512}
data: {seq_len: 32}
train: {global_batch_tokens: 256, steps: 6, precision: fp64}
optimizer: {lr: 3e-3}
lr_schedule: {warmup_steps: 2, min_lr: 3e-4}
metrics: {console: false, wandb: {mode: disabled}}
"""

FOUR = ("layout.tensor=2", "layout.pipeline=2")
"""Four ranks: TP2 x PP2."""


def write_yaml(folder: Path) -> str:
    """The YAML of a small run; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small.yaml"
    file.write_text(YAML)
    return str(file)


def train(run: Path, *overrides: str) -> int:
    """`megallama train` of the small run, alone on this machine; its exit code."""
    return train_through("megallama.cli:train_rank", run, *overrides)


def train_through(target: str, run: Path, *overrides: str) -> int:
    """As `train`, but each rank runs `target`; one thread a rank, on any number of cores."""

    def start(_: str, world_size: int, args: tuple[object, ...]) -> Outcome:
        return run_local(target, world_size, args, threads=1)

    with mock.patch("megallama_launch.local.run_local", start):
        return main(["train", write_yaml(run.parent), f"run={run}", *overrides])


def step_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of all steps of all starts, in the order they were written."""
    return [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "step"]


def losses(run: Path) -> list[float]:
    """Loss of each line of a step, exactly as it was computed."""
    return [row["loss"] for row in step_lines(run)]


def curve(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, grad norm) of each line of a step."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in step_lines(run)]


def evaluations(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of each evaluation."""
    rows = read_metrics(run / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "eval"]


def saved_steps(run: Path) -> list[int]:
    """The steps whose checkpoints are in the run folder, by their manifests."""
    manifests = sorted((run / "checkpoints").glob("step-*/manifest.json"))
    return [json.loads(file.read_text())["step"] for file in manifests]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative difference of two curves of one length."""
    assert len(one) == len(other) > 0, (len(one), len(other))
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def wait_for(run: Path, step: int, timeout_s: float = 60.0) -> None:
    """Wait until a line of that step, or of a later one, is in metrics.jsonl."""
    until = time.monotonic() + timeout_s
    file = run / "metrics.jsonl"
    while time.monotonic() < until:
        if file.exists() and any(row["step"] >= step for row in step_lines(run)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {timeout_s} s")


def ranks_of(parent: int) -> list[int]:
    """Process ids of the ranks that a process started: its forkserver's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and _parent(_parent(int(entry.name))) == parent:
            with suppress(ProcessLookupError):
                if os.getpgid(int(entry.name)) == int(entry.name):  # a rank leads its own group
                    found.append(int(entry.name))
    return sorted(found)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Run `act` in a thread while the block runs; its error is the test's."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not errors, errors


def rewind(run: Path, step: int) -> None:
    """Make a finished run one that was killed right after its checkpoint of `step`."""
    for folder in (run / "checkpoints").glob("step-*"):
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)
    file = run / "metrics.jsonl"
    kept = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= step]
    file.write_text("".join(f"{line}\n" for line in kept))
