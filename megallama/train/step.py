"""One optimizer step, and one evaluation, on one rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megallama.config.schema import Config
from megallama.data.batch import Batch
from megallama.mesh import ProcessGroupManager
from megallama.model.seams import IGNORED_LABEL
from megallama.observe.mfu import attended_pairs
from megallama.parallel.collectives import sum_over, sum_over_world
from megallama.parallel.context.compose import Stream, plan_for_rank
from megallama.parallel.data import MASTER_DTYPE, free_gathered_weights
from megallama.parallel.pipeline.runtime import LocalStages, MicroBatch, Watch, execute, unwatched
from megallama.parallel.pipeline.schedule import FORWARD_ONLY
from megallama.parallel.pipeline.stages import program
from megallama.train.optimizer import (
    AdamW,
    SquaredNorm,
    clip_coefficient,
    local_gradients,
    squared_norm_share,
    sum_tied_gradient,
)


@dataclass(frozen=True)
class Trainer:
    """What a rank trains with."""

    config: Config
    groups: ProcessGroupManager
    stages: LocalStages
    optimizer: AdamW
    squared_norm: SquaredNorm


@dataclass(frozen=True)
class StepResult:
    """Numbers of the global batch, the same on every rank."""

    loss: float
    """Nats per valid token."""
    grad_norm: float
    """Before clipping."""
    valid_tokens: int
    attended_pairs: int
    """Query-key pairs that attention computed, for counting FLOPs."""
    stop_requested: bool
    """Some rank was asked to stop; all learn of it in the same step."""


class Diverged(Exception):  # noqa: N818 - it says what happened
    """Loss or gradient is no longer a number."""

    exit_code = 3


def train_step(
    trainer: Trainer,
    batches: Sequence[Batch],
    lr: float,
    *,
    stop: Callable[[], bool] = lambda: False,
    watch: Watch = unwatched,
) -> StepResult:
    """Forward, backward, reduce, clip, update.

    Args:
        trainer: of this rank.
        batches: the micro-batches this rank reads in this step.
        lr: learning rate of the step.
        stop: whether this rank was asked to stop; asked once backward is done.
        watch: what each forward and backward runs in.

    The loss is the sum of token losses over the valid tokens of the global batch, whatever the
    layout and the number of micro-batches: each token is divided by that number before backward,
    and every reduction is a sum.

    Raises:
        Diverged: loss or grad norm is not finite.

    """
    config, groups, module = trainer.config, trainer.groups, trainer.stages.module
    loss_share, counts = _run(trainer, batches, config.layout.schedule, watch)
    gradients = local_gradients(module)
    sum_tied_gradient(gradients, groups)
    kv_heads, squared_norm = config.model.kv_heads, trainer.squared_norm
    squares = squared_norm_share(gradients, groups, kv_heads, squared_norm).to(loss_share.dtype)
    asked = torch.full_like(loss_share, float(stop()))
    loss, squared_norm, asked = sum_over_world(torch.stack([loss_share, squares, asked]))
    grad_norm = squared_norm.sqrt()
    trainer.optimizer.step(lr=lr, clip=clip_coefficient(grad_norm, config.train.grad_clip))
    trainer.optimizer.zero_grad()
    valid, pairs = counts.tolist()
    result = StepResult(loss.item(), grad_norm.item(), valid, pairs, bool(asked))
    if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
        raise Diverged(f"loss {result.loss}, grad norm {result.grad_norm}: training has diverged")
    return result


def evaluate(trainer: Trainer, steps: Sequence[Sequence[Batch]]) -> tuple[float, int]:
    """Mean loss over the valid tokens of several global batches, and their number."""
    total, valid = 0.0, 0
    for batches in steps:
        loss_share, counts = _run(trainer, batches, FORWARD_ONLY, unwatched)
        tokens = int(counts[0])
        total += sum_over_world(loss_share).item() * tokens
        valid += tokens
    free_gathered_weights(trainer.stages.module)
    return total / max(1, valid), valid


def _run(
    trainer: Trainer, batches: Sequence[Batch], schedule: str, watch: Watch
) -> tuple[Tensor, Tensor]:
    """Execute a schedule.

    Returns:
        This rank's share of the loss (the shares of all ranks add up), and `[valid tokens, attended
        pairs]` of the global batch.

    """
    stages, groups = trainer.stages, trainer.groups
    micro_batches = [_to_device(batch, trainer) for batch in batches]
    counts = sum_over(_counts(batches).to(stages.device), groups.data.group)
    dtype = MASTER_DTYPE[trainer.config.train.precision]
    loss_scale = 1 / counts[0].clamp(min=1).to(dtype)
    todo = program(trainer.config, groups.pipeline.rank, len(micro_batches), schedule)
    loss = execute(todo, stages, micro_batches, groups, loss_scale, watch)
    return (loss if groups.tensor.rank == 0 else torch.zeros_like(loss)), counts


def _to_device(batch: Batch, trainer: Trainer) -> MicroBatch:
    device, config = trainer.stages.device, trainer.config
    positions, dtype = batch.position_ids.to(device), trainer.stages.message_dtype
    stream = Stream(config.model, positions, batch.cu_seqlens, dtype, config.kernels.attention)
    held, plan = plan_for_rank(stream, config.layout, trainer.groups.context)
    tokens, labels = batch.tokens.to(device), batch.labels.to(device)
    if held is not None:
        tokens, labels = tokens[held], labels[held]
    return MicroBatch(tokens, labels, plan)


def _counts(batches: Sequence[Batch]) -> Tensor:
    valid = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
    pairs = sum(attended_pairs(batch.cu_seqlens) for batch in batches)
    return torch.tensor([valid, pairs])
