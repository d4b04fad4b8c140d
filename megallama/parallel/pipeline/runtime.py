"""Executes a schedule's actions on one rank.

Messages are `[T/t, d]` in the compute dtype. Nothing but the stream travels: every rank reads its
own tokens, labels and plan. The schedule alone decides the order.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.mesh import ProcessGroupManager
from megallama.model.attention import AttentionPlan
from megallama.model.llama import Llama
from megallama.parallel.data import prepare_backward
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
class LocalStages:
    """A rank's stages of the pipeline and what its messages look like."""

    module: Llama
    """Its parts are this rank's stages: part v is stage v * pipeline + rank."""
    low: Mapping[str, Tensor] | None
    """The low halves of its parameters by global name, if masters are split."""
    count: int
    """Stages of the whole pipeline."""
    reshard_after_forward: bool
    message_shape: tuple[int, int]
    """`(T/t, d)`."""
    message_dtype: torch.dtype
    device: torch.device


Watch = Callable[[Action], AbstractContextManager[None]]
"""Called with each forward and backward; it runs inside what is returned."""


def unwatched(_: Action) -> AbstractContextManager[None]:
    """A Watch that does nothing."""
    return nullcontext()


_Key = tuple[int, int]
"""Stage and micro-batch."""


@dataclass
class _Execution:
    """One step: what it works with, and tensors between an action and the one that uses them."""

    stages: LocalStages
    groups: ProcessGroupManager
    micro_batches: Sequence[MicroBatch]
    loss_scale: Tensor
    arriving: dict[tuple[Kind, int, int], tuple[dist.Work, Tensor]] = field(default_factory=dict)
    sending: dict[Action, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    inputs: dict[_Key, Tensor] = field(default_factory=dict)
    outputs: dict[_Key, Tensor] = field(default_factory=dict)
    output_gradients: dict[_Key, list[Tensor]] = field(default_factory=dict)
    """A box for each output that was sent; its gradient is put there before backward."""
    input_gradients: dict[_Key, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None


class _Sent(torch.autograd.Function):
    """A scalar that stands for an output that was sent, so that only the message holds its memory:
    backward takes the output's gradient from a box.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.box.pop(), None


def connect(groups: ProcessGroupManager, device: torch.device) -> None:
    """Exchange one message between neighbours, pair by pair, before the first step.

    NCCL connects two ranks at their first message and makes both hosts wait for it. In a schedule
    that posts receives ahead of sends, that wait would be for ever.
    """
    rank, size = groups.pipeline.rank, groups.pipeline.size
    message = torch.zeros(1, device=device)
    neighbours = [(lower, lower + 1) for lower in range(size - 1)]
    ends = [(size - 1, 0)] if size > 1 else []
    for pairs, group in (
        (neighbours, groups.pipeline.group),
        (neighbours, groups.pipeline_gradients),
        (ends, groups.pipeline_wrap),
        (ends, groups.pipeline_wrap_gradients),
    ):
        for one, other in pairs:
            if rank == one:
                dist.send(message, group=group, group_dst=other)
            elif rank == other:
                dist.recv(message, group=group, group_src=one)


def execute(
    actions: Sequence[Action],
    stages: LocalStages,
    micro_batches: Sequence[MicroBatch],
    groups: ProcessGroupManager,
    loss_scale: Tensor,
    watch: Watch,
) -> Tensor:
    """Run one step's actions.

    Args:
        actions: of this rank, from `schedule.actions`.
        stages: this rank's.
        micro_batches: of this rank's data coordinate, in order.
        groups: this rank's process groups.
        loss_scale: 1 / valid tokens of the global batch.
        watch: what each forward and backward runs in, to time it.

    Returns:
        This rank's share of the global loss: the scaled sum of its token losses where the last
        stage is (the same on all tensor ranks), 0 elsewhere; at least float32. Gradients are in
        `.grad`.

    """
    state = _Execution(stages, groups, micro_batches, loss_scale)
    last_backward = {
        action.stage: n for n, action in enumerate(actions) if action.kind == Kind.BACKWARD
    }
    for n, action in enumerate(actions):
        if action.kind not in (Kind.FORWARD, Kind.BACKWARD):
            _MESSAGES[action.kind](state, action)
            continue
        if action.kind == Kind.BACKWARD:
            prepare_backward(
                stages.module,
                _part(state, action),
                last_of_part=n == last_backward[action.stage],
                last_of_rank=n == max(last_backward.values()),
                zero3=stages.reshard_after_forward,
            )
        received = _received(state, action)
        _let_go_of_what_left(state, action)
        with watch(action), torch.set_grad_enabled(bool(last_backward)):
            _COMPUTE[action.kind](state, action, received)
    for work, _ in state.sending.values():
        work.wait()
    return torch.zeros_like(loss_scale) if state.loss is None else state.loss


def _part(state: _Execution, action: Action) -> int:
    return action.stage // state.groups.pipeline.size


def _forward(state: _Execution, action: Action, received: Tensor | None) -> None:
    stage, m = action.stage, action.micro_batch
    batch = state.micro_batches[m]
    last = stage == state.stages.count - 1
    x = batch.tokens if received is None else received
    if received is not None and torch.is_grad_enabled():
        x.requires_grad_()
    labels = batch.labels if last else None
    out = state.stages.module(x, batch.plan, labels, state.loss_scale, _part(state, action))
    if last:
        state.loss = out.detach() if state.loss is None else state.loss + out.detach()
    if not last or out.requires_grad:
        state.inputs[stage, m], state.outputs[stage, m] = x, out


def _backward(state: _Execution, action: Action, received: Tensor | None) -> None:
    stage, m = action.stage, action.micro_batch
    if received is not None:
        state.output_gradients.pop((stage, m)).append(received)
    x = state.inputs.pop((stage, m))
    state.outputs.pop((stage, m)).backward()
    if stage > 0:
        assert x.grad is not None
        state.input_gradients[stage, m] = x.grad


def _received(state: _Execution, action: Action) -> Tensor | None:
    """The message that a forward or backward computes with; None where it needs none."""
    key = (_NEEDS[action.kind], action.stage, action.micro_batch)
    if key not in state.arriving:
        ends = {Kind.FORWARD: 0, Kind.BACKWARD: state.stages.count - 1}
        assert action.stage == ends[action.kind], f"nothing was received for {action}"
        return None
    work, buffer = state.arriving.pop(key)
    work.wait()
    return buffer


def _let_go_of_what_left(state: _Execution, action: Action) -> None:
    """Drop the messages that are sent for sure: gloo does not say so of itself, but an output whose
    gradient has come back has arrived.
    """
    answered = Action(Kind.SEND_ACTIVATION, action.stage + 1, action.micro_batch)
    if action.kind == Kind.BACKWARD and answered in state.sending:
        work, _ = state.sending.pop(answered)
        work.wait()
    for sent in [a for a, (work, _) in state.sending.items() if work.is_completed()]:
        del state.sending[sent]


def _send_activation(state: _Execution, action: Action) -> None:
    key = (action.stage - 1, action.micro_batch)
    out = state.outputs.pop(key)
    _send(state, action, out.detach())
    if out.requires_grad:
        box = state.output_gradients.setdefault(key, [])
        state.outputs[key] = _Sent.apply(out, box)
    else:
        del state.inputs[key]


def _send_gradient(state: _Execution, action: Action) -> None:
    gradient = state.input_gradients.pop((action.stage + 1, action.micro_batch))
    _send(state, action, gradient)


def _receive_activation(state: _Execution, action: Action) -> None:
    _receive(state, action, action.stage - 1)


def _receive_gradient(state: _Execution, action: Action) -> None:
    _receive(state, action, action.stage + 1)


_COMPUTE: dict[Kind, Callable[[_Execution, Action, Tensor | None], None]] = {
    Kind.FORWARD: _forward,
    Kind.BACKWARD: _backward,
}
_NEEDS = {Kind.FORWARD: Kind.RECEIVE_ACTIVATION, Kind.BACKWARD: Kind.RECEIVE_GRADIENT}
_MESSAGES: dict[Kind, Callable[[_Execution, Action], None]] = {
    Kind.SEND_ACTIVATION: _send_activation,
    Kind.SEND_GRADIENT: _send_gradient,
    Kind.RECEIVE_ACTIVATION: _receive_activation,
    Kind.RECEIVE_GRADIENT: _receive_gradient,
}


def _tag(state: _Execution, action: Action) -> int:
    return action.stage * len(state.micro_batches) + action.micro_batch


def _channel(state: _Execution, action: Action) -> dist.ProcessGroup:
    """The group a message travels in; no two ranks ever send to each other in one."""
    groups = state.groups
    if action.kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION):
        wraps = stage_rank(action.stage, groups.pipeline.size) == 0
        return groups.pipeline_wrap if wraps else groups.pipeline.group
    wraps = stage_rank(action.stage + 1, groups.pipeline.size) == 0
    return groups.pipeline_wrap_gradients if wraps else groups.pipeline_gradients


def _send(state: _Execution, action: Action, message: Tensor) -> None:
    stages, group = state.stages, _channel(state, action)
    # A receive buffer that is too large would be filled in part, in silence.
    if message.shape != stages.message_shape or message.dtype != stages.message_dtype:
        raise RuntimeError(
            f"stage {action.stage} would get {tuple(message.shape)} {message.dtype}, "
            f"and expects {stages.message_shape} {stages.message_dtype}"
        )
    peer = stage_rank(action.stage, state.groups.pipeline.size)
    message = message.contiguous()
    work = dist.isend(message, group=group, group_dst=peer, tag=_tag(state, action))
    assert work is not None
    # Waiting here would wait for the receiver; the tensor is kept until it has left.
    state.sending[action] = (work, message)


def _receive(state: _Execution, action: Action, sender: int) -> None:
    stages, group = state.stages, _channel(state, action)
    buffer = torch.empty(stages.message_shape, dtype=stages.message_dtype, device=stages.device)
    peer = stage_rank(sender, state.groups.pipeline.size)
    work = dist.irecv(buffer, group=group, group_src=peer, tag=_tag(state, action))
    assert work is not None
    state.arriving[action.kind, action.stage, action.micro_batch] = (work, buffer)
