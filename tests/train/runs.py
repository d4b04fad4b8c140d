"""Small runs through the real command, and what they left behind."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
