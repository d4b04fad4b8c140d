"""Training speed on CPU, side by side with picotron: the same model, tokens, layout and machine.

    python benchmarks/peer_cpu.py --peer PATH [--layouts tp2 pp2] [--steps 10] [--runs 5]

PATH is a checkout of github.com/huggingface/picotron. Nothing of it is in this repository: its
modules are imported from PATH and put together as its `train.py` does it. A layout that it cannot
run is reported with its own error. Packages that it imports but never calls on CPU are replaced by
empty stand-ins where they are missing.

A step is timed from batches in memory to updated weights: forward, backward, reduction of
gradients, optimizer. Both sides compute in fp32 with one thread a process, over gloo, without
document masks and without recomputation. A run's step is the median of those after WARM_UP, on
rank 0; the table has medians over runs, which alternate.

What a step has on one side only:

- ours: valid tokens are counted, gradients are clipped by their global norm; AdamW is fused; `tp`
  comes with sequence parallelism; `dp2` and `cp2` shard the optimizer's state and reduce gradients
  once a step (the default for a model this small); `dp2-copies` keeps whole copies.
- picotron: `dp` keeps whole copies; AdamW is torch's default, not fused; attention is SDPA but for
  `cp2`, a ring written out in matrix products; `cp2` leaves out the reduction of gradients, so that
  its ranks drift apart.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from megallama_launch.local import run_local
from torch import Tensor

from megallama.config.load import load_text
from megallama.config.rules import required_processes, resolve_world
from megallama.config.schema import Config, parameter_count
from megallama.data.batch import Batch, micro_batches
from megallama.data.sampler import Sample
from megallama.observe.device import device_name
from megallama.train.environment import Place, find_place
from megallama.train.loop import read_step
from megallama.train.lr import learning_rate
from megallama.train.session import build_trainer, process_group
from megallama.train.step import train_step

RUN = """
model:
  {hidden: 256, layers: 4, heads: 8, kv_heads: 4, head_dim: 32, ffn: 768, vocab: 1024}
data: {seq_len: 256, document_mask: false}
train: {global_batch_tokens: 2048, steps: 1000, precision: fp32}
optimizer: {lr: 3.0e-4}
"""

LAYOUTS = {
    "1": [],
    "tp2": ["layout.tensor=2"],
    "pp2": ["layout.pipeline=2"],
    "cp2": ["layout.context=2"],
    "dp2": ["layout.data_shard=2"],
    "dp2-copies": ["layout.data_replicate=2", "layout.data_shard=1"],
    "tp2-pp2-dp2": ["layout.tensor=2", "layout.pipeline=2", "layout.data_shard=2"],
}

WARM_UP = 3
PEER_FILES = ("train.py", "picotron/model.py", "picotron/process_group_manager.py")
TIMEOUT_S = 600.0
INTERRUPTED = 128
"""Exit codes above are signals."""
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
PEER_READS = {"DEVICE": "cpu", "DTYPE": "float32", "FLASH_ATTEN": "0", "CONTEXT_PARALLEL": "0"}
UNUSED_BY_PEER = (
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn.layers.rotary",
    "flash_attn.ops.triton.layer_norm",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "transformers",
    "wandb",
)


class DoesNotRun(Exception):  # noqa: N818 - it says what happened
    """One side has no time for a layout; the text says why."""


@dataclass(frozen=True)
class RandomTokens:
    """Sample i follows from i alone; every label counts."""

    seq_len: int
    vocab: int

    def __getitem__(self, index: int) -> Sample:
        """One sequence."""
        stream = np.random.default_rng(index).integers(0, self.vocab, self.seq_len + 1)
        return Sample(stream[:-1], stream[1:], np.array([0, self.seq_len], dtype=np.int32))


def random_tokens(config: Config) -> RandomTokens:
    """What both sides train on."""
    return RandomTokens(config.data.seq_len, config.model.vocab)


def run_ours(plain: dict[str, Any], steps: int, result: str) -> None:
    """As one rank: time steps of `megallama train`."""
    config = Config.model_validate(plain)
    place = _place()
    with process_group(place) as device:
        trainer = build_trainer(config, device)
        batches = [read_step(trainer, random_tokens(config), n) for n in range(WARM_UP + steps)]

        def step(number: int) -> None:
            lr = learning_rate(config.lr_schedule, config.optimizer.lr, config.train.steps, number)
            train_step(trainer, batches[number], lr)

        _time_steps(step, steps, place, result)


def run_peer(plain: dict[str, Any], steps: int, result: str, peer: str) -> None:
    """As one rank: time steps of the peer, whose parts are put together as its train.py does."""
    config = Config.model_validate(plain)
    place = _place()
    os.environ.update(PEER_READS)
    stand_in_for_unused()
    sys.path.insert(0, peer)
    with process_group(place) as device:
        groups, model = _build_peer(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
        batches = [_peer_step(config, groups, n) for n in range(WARM_UP + steps)]
        forward_backward = _peer_forward_backward(config, model, device)
        average_loss = importlib.import_module("picotron.utils").average_loss_across_dp_cp_ranks

        def step(number: int) -> None:
            optimizer.zero_grad()
            loss = forward_backward(PeerLoader(batches[number]))
            average_loss(loss, device)
            optimizer.step()
            if hasattr(model, "reset"):
                model.reset()

        _time_steps(step, steps, place, result)


def stand_in_for_unused() -> None:
    """Let the peer's imports succeed where packages are missing that it does not call here."""
    missing = {name.split(".")[0] for name in UNUSED_BY_PEER}
    missing = {root for root in missing if importlib.util.find_spec(root) is None}
    for name in UNUSED_BY_PEER:
        if name.split(".")[0] in missing:
            sys.modules[name] = MagicMock()


def _build_peer(config: Config) -> tuple[Any, Any]:
    """The peer's process groups and its model on this rank."""
    manager = importlib.import_module("picotron.process_group_manager")
    layout = config.layout
    manager.setup_process_group_manager(
        tp_size=layout.tensor,
        cp_size=layout.context,
        pp_size=layout.pipeline,
        dp_size=layout.data_replicate * layout.data_shard,
    )
    groups, shape = manager.process_group_manager, _peer_shape(config)
    model = importlib.import_module("picotron.model").Llama(config=shape)
    if groups.tp_world_size > 1:
        tensor = importlib.import_module("picotron.tensor_parallel.tensor_parallel")
        model = tensor.apply_tensor_parallel(model)
    if groups.pp_world_size > 1:
        pipeline = importlib.import_module("picotron.pipeline_parallel.pipeline_parallel")
        model = pipeline.PipelineParallel(model, shape)
    if groups.cp_world_size > 1:
        context = importlib.import_module("picotron.context_parallel.context_parallel")
        model = context.apply_context_parallel(model)
    if groups.dp_world_size > 1:
        data = importlib.import_module("picotron.data_parallel.data_parallel")
        model = data.DataParallelBucket(model)
    model.train()
    return groups, model


def _peer_shape(config: Config) -> SimpleNamespace:
    """The model's shape by the names that Hugging Face configs have."""
    model = config.model
    return SimpleNamespace(
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        intermediate_size=model.ffn,
        vocab_size=model.vocab,
        max_position_embeddings=config.data.seq_len,
        rms_norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
    )


class PeerLoader:
    """One step's micro-batches, as far as the peer's train steps ask its data loader for them."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.grad_acc_steps = len(batches)
        self._batches = iter(batches)

    def __next__(self) -> dict[str, Any]:
        """The next micro-batch."""
        return next(self._batches)


def _peer_step(config: Config, groups: Any, step: int) -> list[dict[str, Any]]:
    """The peer's micro-batches of a step on this rank: the samples that ours reads."""
    batches = micro_batches(
        random_tokens(config),
        step,
        global_samples=config.train.global_batch_tokens // config.data.seq_len,
        micro_batch=config.layout.micro_batch,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_world_size,
    )
    return [_peer_batch(config, groups, batch) for batch in batches]


def _peer_batch(config: Config, groups: Any, batch: Batch) -> dict[str, Any]:
    def rows(stream: Tensor) -> Tensor:
        whole = stream.view(config.layout.micro_batch, config.data.seq_len)
        return whole.chunk(groups.cp_world_size, dim=1)[groups.cp_rank].contiguous()

    return {
        "input_ids": rows(batch.tokens),
        "target_ids": rows(batch.labels),
        "position_ids": rows(batch.position_ids),
        "hidden_states": None,
    }


def _peer_forward_backward(
    config: Config, model: Any, device: torch.device
) -> Callable[[PeerLoader], float]:
    """The peer's own train step, which ends before the optimizer's."""
    layout = config.layout
    if layout.pipeline == 1:
        train_step = importlib.import_module("train").train_step
        return lambda loader: train_step(model, loader, device)
    pipeline = importlib.import_module("picotron.pipeline_parallel.pipeline_parallel")
    message = (layout.micro_batch, config.data.seq_len // layout.context, config.model.hidden)
    return lambda loader: pipeline.train_step_pipeline_1f1b(
        model, loader, message, device, torch.float32
    )


def _place() -> Place:
    place = find_place(os.environ)
    assert place is not None, "started without a rank"
    return place


def _time_steps(step: Callable[[int], None], steps: int, place: Place, result: str) -> None:
    """Warm up, then time steps; rank 0 writes the seconds of each."""
    seconds = []
    for number in range(WARM_UP + steps):
        began = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
    if place.rank == 0:
        Path(result).write_text(json.dumps(seconds[WARM_UP:]))


def compare(name: str, peer: str, steps: int, runs: int, micro_batch: int) -> str:
    """A row of the table; runs of the two sides alternate."""
    config = load_text(RUN, [*LAYOUTS[name], f"layout.micro_batch={micro_batch}"])
    processes = required_processes(config, devices=0)
    config = resolve_world(config, processes)
    targets = {"ours": ("run_ours",), "peer": ("run_peer", peer)}
    problems: dict[str, str] = {}
    seconds: dict[str, list[float]] = {side: [] for side in targets}
    for _ in range(runs):
        for side in [side for side in targets if side not in problems]:
            try:
                seconds[side].append(seconds_per_step(config, processes, steps, *targets[side]))
            except DoesNotRun as problem:
                problems[side] = str(problem)
    tokens = config.train.global_batch_tokens
    cells = [
        f"does not run: {problems[side]}" if side in problems else f"{tokens / median(times):,.0f}"
        for side, times in seconds.items()
    ]
    return f"| {name} | {processes} | {' | '.join(cells)} | {_ratio(seconds, problems)} |"


def _ratio(seconds: dict[str, list[float]], problems: Collection[str]) -> str:
    """Ours over the peer's: of the medians, and the least and most of two neighbouring runs."""
    if problems:
        return "| "
    ours, peer = seconds.values()
    pairs = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    return f"{median(peer) / median(ours):.2f} | {min(pairs):.2f} to {max(pairs):.2f}"


def seconds_per_step(config: Config, processes: int, steps: int, target: str, *more: str) -> float:
    """The median step of one run.

    Raises:
        DoesNotRun: a rank failed, or the run hung.

    """
    with tempfile.TemporaryDirectory(prefix="megallama-peer-") as folder:
        result = Path(folder) / "seconds.json"
        outcome = run_local(
            f"{Path(__file__).stem}:{target}",
            processes,
            (config.model_dump(), steps, str(result), *more),
            threads=1,
            env=ON_CPU,
            timeout_s=TIMEOUT_S,
            capture=True,
        )
        shutil.rmtree(outcome.outputs[0].parent)
        if outcome.exit_code > INTERRUPTED:
            print(outcome.message, file=sys.stderr)
            sys.exit(outcome.exit_code)
        if outcome.exit_code:
            raise DoesNotRun(outcome.message.splitlines()[0])
        return median(json.loads(result.read_text()))


def conditions(peer: str, steps: int, runs: int, micro_batch: int) -> str:
    """What the numbers depend on."""
    config = load_text(RUN)
    machine = f"{device_name(torch.device('cpu'))}, {len(os.sched_getaffinity(0))} cores"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    commits = f"ours at {_commit(str(Path(__file__).parent))}, picotron at {_commit(peer)}"
    return (
        f"{date.today()}; {machine}; {versions}; {commits}\n"
        f"{parameter_count(config.model):,} parameters; {config.train.global_batch_tokens} tokens "
        f"a step in micro-batches of {micro_batch} x {config.data.seq_len}; median of {runs} "
        f"alternating runs, each the median of {steps} steps after {WARM_UP}"
    )


def _commit(folder: str) -> str:
    command = ["git", "-C", folder, "describe", "--always", "--dirty=, changed"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "a commit unknown"


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of picotron")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--steps", type=_count, default=10, help="timed steps in a run")
    parser.add_argument("--runs", type=_count, default=5, help="runs of each side")
    parser.add_argument("--micro-batch", type=_count, default=1, help="sequences in a forward pass")
    options = parser.parse_args()
    missing = [name for name in PEER_FILES if not (options.peer / name).is_file()]
    if missing:
        print(f"--peer {options.peer}: no checkout of picotron: no {missing[0]}", file=sys.stderr)
        return 2
    peer = str(options.peer.resolve())
    print(conditions(peer, options.steps, options.runs, options.micro_batch), end="\n\n")
    print("| layout | processes | ours, tokens/s | picotron, tokens/s | ratio | over runs |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.layouts:
        row = compare(name, peer, options.steps, options.runs, options.micro_batch)
        print(row, flush=True)
    return 0


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1")
    return count


if __name__ == "__main__":
    sys.exit(main())
