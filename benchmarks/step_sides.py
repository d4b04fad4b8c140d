"""One run of benchmarks/step.py: steps of ours, or of Hugging Face transformers, in one process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peer_cpu import RandomTokens

from megallama.config.schema import Config
from megallama.data.batch import Batch, micro_batches
from megallama.observe.device import device_name
from megallama.train.environment import find_place
from megallama.train.session import build_trainer, process_group
from megallama.train.step import train_step

WARM_UP = 3
CYCLE = 4
"""Steps with different tokens; then the same again."""
LR, CLIP = 3e-4, 1.0


@dataclass(frozen=True)
class Measured:
    """One run."""

    seconds_per_step: float
    steps: int
    peak_gib: float
    """Of tensors; 0 on CPU."""
    reserved_gib: float
    """Of the allocator; 0 on CPU."""
    loss: float
    """After WARM_UP steps: sides that train the same agree."""
    device: str


def run_ours(plain: dict[str, Any], seconds: float, result: str) -> None:
    """As the only rank: time steps of `megallama train`."""
    config = Config.model_validate(plain)
    place = find_place(os.environ)
    assert place is not None, "started without a rank"
    with process_group(place) as device:
        trainer = build_trainer(config, device)
        steps = [read(config, number) for number in range(CYCLE)]
        time_steps(
            lambda number: train_step(trainer, steps[number % CYCLE], LR).loss,
            seconds,
            device,
            result,
        )


def run_hugging_face(plain: dict[str, Any], seconds: float, result: str) -> None:
    """As the only process: time steps of transformers' model and torch's optimizer."""
    config = Config.model_validate(plain)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_hugging_face(config, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batches = [read(config, number) for number in range(CYCLE)]

    def step(number: int) -> float:
        total = torch.zeros((), device=device)
        for batch in batches[number % CYCLE]:
            tokens = batch.tokens.to(device)[None]
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss = loss / len(batches[number % CYCLE])
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    time_steps(step, seconds, device, result)


def build_hugging_face(config: Config, device: torch.device) -> Any:
    """LlamaForCausalLM with random bf16 weights, whole layers recomputed."""
    transformers, shape = import_module("transformers"), config.model
    theirs = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        rms_norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
        max_position_embeddings=config.data.seq_len,
        tie_word_embeddings=shape.tie_embeddings,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = transformers.LlamaForCausalLM(theirs)
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def read(config: Config, step: int) -> list[Batch]:
    """The micro-batches of a step."""
    return micro_batches(
        RandomTokens(config.data.seq_len, config.model.vocab),
        step,
        global_samples=config.train.global_batch_tokens // config.data.seq_len,
        micro_batch=config.layout.micro_batch,
        dp_rank=0,
        dp_size=1,
    )


def time_steps(
    step: Callable[[int], float], seconds: float, device: torch.device, result: str
) -> None:
    """Warm up, then run steps for `seconds` at least; each ends with its loss on the host."""
    loss = 0.0
    for number in range(WARM_UP):
        loss = step(number)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    done, began = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - began < seconds:
        step(WARM_UP + done)
        done += 1
    if on_gpu:
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - began
    measured = Measured(
        seconds_per_step=taken / done,
        steps=done,
        peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0,
        reserved_gib=torch.cuda.max_memory_reserved(device) / 2**30 if on_gpu else 0.0,
        loss=loss,
        device=device_name(device),
    )
    Path(result).write_text(json.dumps(asdict(measured)))
