"""Whole training steps on one GPU: ours beside Hugging Face transformers and a compiled model.

    python benchmarks/step.py --output FOLDER [--model 1b] [--sides elementwise hugging-face]
        [--seconds 30] [--runs 3] [--micro-batches 4]

All sides train on the same random tokens, without document masks, one sequence of 8,192 to a
micro-batch: forward and backward of each micro-batch, clipping by the global norm, AdamW, and the
loss read back. Every run is a process of its own, runs of the sides alternate, and the table has
medians over runs. A run is timed over at least `--seconds` of steps, after some to warm up. What
runs out of memory, or does not run, is a row that says so.

Sides, and their memory in bytes per parameter with the gradient, before activations:

- ours: fp32 masters, moments and accumulated gradients, 16, and the bf16 copy that computes and its
  gradients, up to 6 more (`full-reshard` frees them); split masters (`optimizer.master=split`): 12.
- `compiled-selective`: our model without kernels, each block compiled, products kept; as ours.
- `hugging-face`: LlamaForCausalLM in eager mode with SDPA, whole layers recomputed, torch's fused
  AdamW. Weights, gradients and moments are bf16, 8: less memory and traffic than ours, and less
  exact, since small updates round away: a fast peer rather than an equal one. Its loss leaves out
  a sequence's last token. Rotary frequencies are not scaled, which no time depends on.

MFU is over the data sheet's dense bf16 peak, counted causally and as PaLM does
(megallama/observe/mfu.py). `--model tiny` runs everywhere: without a GPU it is a dry run.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median

import torch
from megallama_launch.local import run_local
from peer_cpu import INTERRUPTED, DoesNotRun
from step_sides import Measured

from megallama.config.errors import UserError
from megallama.config.load import load_text
from megallama.config.rules import resolve_world
from megallama.config.schema import Config, KernelsConfig
from megallama.observe.mfu import attended_pairs, model_flops, palm_flops, peak_flops

MODELS = {"tiny": ("tiny", 64), "1b": ("llama3.2_1b", 8192), "8b": ("llama3.1_8b", 8192)}
"""Preset and sequence length."""

RUN = """
model: {model}
layout: {{data_shard: 1, micro_batch: 1}}
data: {{seq_len: {seq_len}, document_mask: false}}
train: {{global_batch_tokens: {tokens}, steps: 1000, precision: bf16}}
optimizer: {{lr: 3.0e-4}}
"""

RECOMPUTE = "train.activation_checkpointing="
SPLIT = "optimizer.master=split"
SIDES = {
    "none": [],
    "elementwise": [f"{RECOMPUTE}elementwise"],
    "selective": [f"{RECOMPUTE}selective"],
    "full": [f"{RECOMPUTE}full"],
    "full-reshard": [f"{RECOMPUTE}full", "layout.reshard_after_forward=true"],
    "split-elementwise": [SPLIT, f"{RECOMPUTE}elementwise"],
    "split-full": [SPLIT, f"{RECOMPUTE}full"],
    "compiled-selective": [
        "train.compile=true",
        f"{RECOMPUTE}selective",
        *(f"kernels.{op}=torch" for op in KernelsConfig.model_fields if op != "attention"),
    ],
}
"""Overrides of RUN."""
HUGGING_FACE = "hugging-face"

START_S = 300.0
"""Longest that a run may take beyond what is timed: to start, compile and warm up."""


def config_of(side: str, model: str, count: int) -> Config:
    """What a side trains, with `count` micro-batches a step; the peer reads its sizes from it."""
    preset, seq_len = MODELS[model]
    text = RUN.format(model=preset, seq_len=seq_len, tokens=count * seq_len)
    return resolve_world(load_text(text, SIDES.get(side, [])), 1)


def measure(side: str, config: Config, seconds: float) -> Measured:
    """One run of a side, in a process of its own.

    Raises:
        DoesNotRun: out of memory, or another failure.

    """
    target = "run_hugging_face" if side == HUGGING_FACE else "run_ours"
    with tempfile.TemporaryDirectory(prefix="megallama-step-") as folder:
        result = Path(folder) / "measured.json"
        outcome = run_local(
            f"step_sides:{target}",
            1,
            (config.model_dump(), seconds, str(result)),
            timeout_s=seconds + START_S,
            capture=True,
        )
        shutil.rmtree(outcome.outputs[0].parent)
        if outcome.exit_code > INTERRUPTED:
            print(outcome.message, file=sys.stderr)
            sys.exit(outcome.exit_code)
        if outcome.exit_code:
            print(outcome.text, file=sys.stderr)
            short = (outcome.message.strip().splitlines() or ["no message"])[0][:160]
            raise DoesNotRun("out of memory" if "out of memory" in outcome.message else short)
        return Measured(**json.loads(result.read_text()))


def table(
    configs: dict[str, Config], runs: dict[str, list[Measured]], problems: dict[str, str]
) -> str:
    """Markdown, ours and peers in the order in which they were asked for."""
    peer = runs.get(HUGGING_FACE) or []
    peer_s = median(run.seconds_per_step for run in peer) if peer else None
    lines = [
        "| side | tokens/s | over runs | MFU | MFU (PaLM) | peak GiB | reserved GiB | loss "
        f"| over {HUGGING_FACE} |",
        "|---" * 9 + "|",
    ]
    for side, measured in runs.items():
        if side in problems:
            lines.append(f"| {side} | {problems[side]} |" + " |" * 7)
            continue
        if not measured:
            continue
        config, seconds = configs[side], median(run.seconds_per_step for run in measured)
        tokens = config.train.global_batch_tokens
        each = [f"{tokens / run.seconds_per_step:,.0f}" for run in measured]
        peak, reserved = (
            max(getattr(run, name) for run in measured) for name in ("peak_gib", "reserved_gib")
        )
        ratio = "" if peer_s is None else f"{peer_s / seconds:.2f}"
        cells = [side, f"{tokens / seconds:,.0f}", ", ".join(each)]
        cells += _mfu(config, seconds, measured[0].device)
        cells += [f"{peak:.1f}", f"{reserved:.1f}", f"{measured[-1].loss:.3f}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mfu(config: Config, seconds: float, device: str) -> list[str]:
    """Causal and PaLM's, or nothing for a device without a published peak."""
    peak, seq_len = peak_flops(device, "bf16"), config.data.seq_len
    if peak is None:
        return ["", ""]
    tokens = config.train.global_batch_tokens
    pairs = attended_pairs([0, seq_len]) * (tokens // seq_len)
    flops = (
        model_flops(config.model, tokens, pairs),
        palm_flops(config.model, tokens, seq_len),
    )
    return [f"{count / seconds / peak:.1%}" for count in flops]


def main() -> int:
    """Alternate the sides; the table is written after every run. Returns the exit code."""
    options = _options()
    configs: dict[str, Config] = {}
    problems: dict[str, str] = {}
    runs: dict[str, list[Measured]] = {side: [] for side in options.sides}
    for side in options.sides:
        try:
            configs[side] = config_of(side, options.model, options.micro_batches)
        except UserError as problem:
            problems[side] = str(problem).splitlines()[0]
    options.output.mkdir(parents=True, exist_ok=True)
    for _ in range(options.runs):
        for side in [side for side in options.sides if side not in problems]:
            try:
                runs[side].append(measure(side, configs[side], options.seconds))
            except DoesNotRun as problem:
                problems[side] = str(problem)
            _write(options, configs, runs, problems)
            print(f"{side}: {problems.get(side) or runs[side][-1]}", flush=True)
    print(_write(options, configs, runs, problems))
    return 0


def _write(
    options: argparse.Namespace,
    configs: dict[str, Config],
    runs: dict[str, list[Measured]],
    problems: dict[str, str],
) -> str:
    """`step-MODEL.json` and `step-MODEL.md`."""
    devices = {run.device for measured in runs.values() for run in measured}
    dry = (
        ""
        if torch.cuda.is_available()
        else "**DRY RUN: without a GPU. The times say nothing.**\n\n"
    )
    about = (
        f"{date.today()}; {', '.join(devices)}; torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, Python {platform.python_version()}; {options.model}, "
        f"{options.micro_batches} micro-batches of 1 x {MODELS[options.model][1]}; median of "
        f"{options.runs} alternating runs of {options.seconds:g} s"
    )
    text = f"{dry}{about}\n\n{table(configs, runs, problems)}\n"
    stem = options.output / f"step-{options.model}"
    stem.with_suffix(".md").write_text(text)
    plain = {side: [asdict(run) for run in measured] for side, measured in runs.items()}
    found = {"about": about, "runs": plain, "problems": problems}
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    return text


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", choices=MODELS, default="1b")
    names: Sequence[str] = [*SIDES, HUGGING_FACE]
    parser.add_argument("--sides", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=30.0, help="timed in each run")
    parser.add_argument("--runs", type=int, default=3, help="of each side")
    parser.add_argument("--micro-batches", type=int, default=4, help="in a step")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
