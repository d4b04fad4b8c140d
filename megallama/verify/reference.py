"""What the layout is compared with: `model/`, autograd and torch's plain AdamW in one process.

Nothing of `parallel/` and none of the training step is used here.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megallama_kernels.adamw import split
from megallama_kernels.language import at_least_float32
from torch import Tensor, nn

from megallama.config.schema import Config
from megallama.data.batch import Batch, pack
from megallama.model.attention import plan_attention
from megallama.model.init import initialize
from megallama.model.llama import Llama
from megallama.model.seams import IGNORED_LABEL
from megallama.train.lr import learning_rate
from megallama.verify.samples import global_samples, random_samples

MASTER = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}
COMPUTE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def run(runs: dict[str, tuple[dict[str, Any], int]], folder: str) -> None:
    """Train once for each name: (config, number of micro-batches); save what was seen."""
    for name, (plain_config, micro_batches) in runs.items():
        config = Config.model_validate(plain_config)
        torch.save(train_reference(config, micro_batches), Path(folder) / f"{name}.pt")


def train_reference(config: Config, micro_batches: int) -> dict[str, Any]:
    """Train in one process on whole global batches, cut into `micro_batches` pieces.

    Returns:
        `loss` and `grad_norm` per step; `initial`, `gradient` (of the first step) and
        `final` tensors by parameter name.

    """
    precision, train = config.train.precision, config.train
    master = Llama(config.model).to(MASTER[precision])
    initialize(master, config.model, train.seed)
    compute = Llama(config.model).to(COMPUTE[precision])
    optimizer = _adamw(master, config)
    seen: dict[str, Any] = {"loss": [], "grad_norm": [], "initial": _copies(master)}
    for step in range(train.steps):
        compute.load_state_dict(_computed_with(master, config))
        optimizer.zero_grad()
        seen["loss"].append(_accumulate(master, compute, config, step, micro_batches))
        if step == 0:
            seen["gradient"] = _copies(master, of_gradients=True)
        largest = train.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(master.parameters(), largest, foreach=False)
        seen["grad_norm"].append(norm.item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.lr_schedule, config.optimizer.lr, train.steps, step)
        optimizer.step()
    return seen | {"final": _copies(master)}


def _computed_with(master: nn.Module, config: Config) -> dict[str, Tensor]:
    """The weights in the compute dtype: rounded, or the high halves of split masters."""
    halves = config.optimizer.master == "split"
    return {n: split(p)[0] if halves else p for n, p in master.state_dict().items()}


def _accumulate(
    master: nn.Module, compute: Llama, config: Config, step: int, micro_batches: int
) -> float:
    """Gradients of one global batch into the master's `.grad`; returns the loss."""
    samples, count = random_samples(config), global_samples(config)
    rows = [samples[i] for i in range(step * count, (step + 1) * count)]
    per_piece = -(-count // micro_batches)
    pieces = [pack(rows[i : i + per_piece]) for i in range(0, count, per_piece)]
    valid = sum(int((piece.labels != IGNORED_LABEL).sum()) for piece in pieces)
    total = 0.0
    for piece in pieces:
        compute.zero_grad()
        loss = _loss_sum(compute, piece, config) / valid
        loss.backward()
        total += loss.item()
        for ours, theirs in zip(master.parameters(), compute.parameters(), strict=True):
            assert theirs.grad is not None
            gradient = theirs.grad.to(ours.dtype)
            ours.grad = gradient if ours.grad is None else ours.grad + gradient
    return total


def _loss_sum(model: Llama, batch: Batch, config: Config) -> Tensor:
    """By torch's cross-entropy over whole logits, which no layout uses."""
    dtype = COMPUTE[config.train.precision]
    plan = plan_attention(config.model, batch.position_ids, batch.cu_seqlens, dtype=dtype)
    logits = at_least_float32(model(batch.tokens, plan))
    return F.cross_entropy(logits, batch.labels, ignore_index=IGNORED_LABEL, reduction="sum")


def _adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    settings = config.optimizer
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        foreach=False,
        fused=False,
    )


def _copies(model: nn.Module, *, of_gradients: bool = False) -> dict[str, Tensor]:
    tensors = {name: p.grad if of_gradients else p for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}
