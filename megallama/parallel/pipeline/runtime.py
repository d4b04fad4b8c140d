"""Executes a schedule's actions on one rank.

Messages are `[T/t, d]` in the compute dtype. Nothing but the stream travels: every rank reads its
own tokens, labels and plan. The schedule alone decides the order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.mesh import ProcessGroupManager
from megallama.model.attention import AttentionPlan
from megallama.model.llama import Llama
from megallama.parallel.data import synchronize_gradients
from megallama.parallel.pipeline.schedule import Action, Kind, stage_rank


@dataclass(frozen=True)
class MicroBatch:
    """What every pipeline rank reads by itself."""

    tokens: Tensor
    """`[T]` int64."""
    labels: Tensor
    """`[T]` int64."""
    plan: AttentionPlan


@dataclass(frozen=True)
class PipelineStage:
    """A rank's part of the pipeline and what its messages look like."""

    module: Llama
    index: int
    stages: int
    reshard_after_forward: bool
    message_shape: tuple[int, int]
    """`(T/t, d)`."""
    message_dtype: torch.dtype
    device: torch.device


@dataclass
class _Execution:
    """State of one step: tensors between an action and the one that uses them."""

    arriving: dict[tuple[Kind, int], tuple[dist.Work, Tensor]] = field(default_factory=dict)
    sending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    input_gradients: dict[int, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None


def connect(groups: ProcessGroupManager, device: torch.device) -> None:
    """Exchange one message between neighbours, pair by pair, before the first step.

    NCCL connects two ranks at their first message and makes both hosts wait for it. In a schedule
    that posts receives ahead of sends, that wait would be for ever.
    """
    rank, last = groups.pipeline.rank, groups.pipeline.size - 1
    message = torch.zeros(1, device=device)
    for group in (groups.pipeline.group, groups.pipeline_gradients):
        for parity in (0, 1):
            if rank % 2 == parity and rank < last:
                dist.send(message, group=group, group_dst=rank + 1)
            elif rank % 2 != parity and rank > 0:
                dist.recv(message, group=group, group_src=rank - 1)


def execute(
    actions: Sequence[Action],
    stage: PipelineStage,
    micro_batches: Sequence[MicroBatch],
    groups: ProcessGroupManager,
    loss_scale: Tensor,
) -> Tensor:
    """Run one step's actions.

    Args:
        actions: of this rank, from `schedule.actions`.
        stage: this rank's stage.
        micro_batches: of this rank's data coordinate, in order.
        groups: this rank's process groups.
        loss_scale: 1 / valid tokens of the global batch.

    Returns:
        This rank's share of the global loss: the scaled sum of its token losses on the last stage
        (the same on all tensor ranks), 0 elsewhere; at least float32. Gradients are in `.grad`.

    """
    state = _Execution()
    backwards_left = sum(action.kind == Kind.BACKWARD for action in actions)
    training = backwards_left > 0
    for action in actions:
        if action.kind == Kind.FORWARD:
            with torch.set_grad_enabled(training):
                _forward(state, stage, action.micro_batch, micro_batches, loss_scale)
        elif action.kind == Kind.BACKWARD:
            backwards_left -= 1
            _backward(state, stage, action.micro_batch, last=backwards_left == 0)
        else:
            _MESSAGES[action.kind](state, stage, action, groups)
    for work, _ in state.sending:
        work.wait()
    return torch.zeros_like(loss_scale) if state.loss is None else state.loss


def _forward(
    state: _Execution,
    stage: PipelineStage,
    m: int,
    micro_batches: Sequence[MicroBatch],
    loss_scale: Tensor,
) -> None:
    batch = micro_batches[m]
    last = stage.index == stage.stages - 1
    x = batch.tokens if stage.index == 0 else _received(state, Kind.RECEIVE_ACTIVATION, m)
    if stage.index > 0 and torch.is_grad_enabled():
        x.requires_grad_()
    out = stage.module(x, batch.plan, batch.labels if last else None)
    if last:
        out = out.sum() * loss_scale
        state.loss = out.detach() if state.loss is None else state.loss + out.detach()
    if not last or out.requires_grad:
        state.inputs[m], state.outputs[m] = x, out


def _backward(state: _Execution, stage: PipelineStage, m: int, *, last: bool) -> None:
    synchronize_gradients(stage.module, last=last, reshard=stage.reshard_after_forward)
    is_loss = stage.index == stage.stages - 1
    gradient = None if is_loss else _received(state, Kind.RECEIVE_GRADIENT, m)
    x = state.inputs.pop(m)
    torch.autograd.backward(state.outputs.pop(m), gradient)
    if stage.index > 0:
        assert x.grad is not None
        state.input_gradients[m] = x.grad


def _received(state: _Execution, kind: Kind, m: int) -> Tensor:
    work, buffer = state.arriving.pop((kind, m))
    work.wait()
    return buffer


def _send_activation(
    state: _Execution, stage: PipelineStage, action: Action, groups: ProcessGroupManager
) -> None:
    out = state.outputs[action.micro_batch]
    _send(state, stage, action, out.detach(), groups, groups.pipeline.group)
    if not out.requires_grad:
        del state.outputs[action.micro_batch], state.inputs[action.micro_batch]


def _send_gradient(
    state: _Execution, stage: PipelineStage, action: Action, groups: ProcessGroupManager
) -> None:
    gradient = state.input_gradients.pop(action.micro_batch)
    _send(state, stage, action, gradient, groups, groups.pipeline_gradients)


def _receive_activation(
    state: _Execution, stage: PipelineStage, action: Action, groups: ProcessGroupManager
) -> None:
    _receive(state, stage, action, action.stage - 1, groups, groups.pipeline.group)


def _receive_gradient(
    state: _Execution, stage: PipelineStage, action: Action, groups: ProcessGroupManager
) -> None:
    _receive(state, stage, action, action.stage + 1, groups, groups.pipeline_gradients)


_Message = Callable[[_Execution, PipelineStage, Action, ProcessGroupManager], None]
_MESSAGES: dict[Kind, _Message] = {
    Kind.SEND_ACTIVATION: _send_activation,
    Kind.SEND_GRADIENT: _send_gradient,
    Kind.RECEIVE_ACTIVATION: _receive_activation,
    Kind.RECEIVE_GRADIENT: _receive_gradient,
}


def _send(
    state: _Execution,
    stage: PipelineStage,
    action: Action,
    message: Tensor,
    groups: ProcessGroupManager,
    group: dist.ProcessGroup,
) -> None:
    # A receive buffer that is too large would be filled in part, in silence.
    if message.shape != stage.message_shape or message.dtype != stage.message_dtype:
        raise RuntimeError(
            f"stage {stage.index} would send {tuple(message.shape)} {message.dtype}, "
            f"its peer expects {stage.message_shape} {stage.message_dtype}"
        )
    peer = stage_rank(action.stage, groups.pipeline.size)
    message = message.contiguous()
    work = dist.isend(message, group=group, group_dst=peer, tag=action.micro_batch)
    assert work is not None
    # Waiting here would wait for the receiver; the tensor is kept until it has left.
    state.sending = [(w, t) for w, t in state.sending if not w.is_completed()]
    state.sending.append((work, message))


def _receive(
    state: _Execution,
    stage: PipelineStage,
    action: Action,
    sender: int,
    groups: ProcessGroupManager,
    group: dist.ProcessGroup,
) -> None:
    buffer = torch.empty(stage.message_shape, dtype=stage.message_dtype, device=stage.device)
    peer = stage_rank(sender, groups.pipeline.size)
    work = dist.irecv(buffer, group=group, group_src=peer, tag=action.micro_batch)
    assert work is not None
    state.arriving[action.kind, action.micro_batch] = (work, buffer)
