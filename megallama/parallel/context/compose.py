"""Which tokens a context rank computes, how its attention is planned, and which seams it fills."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megallama.config.schema import LayoutConfig, ModelConfig
from megallama.mesh import Axis, ProcessGroupManager
from megallama.model.attention import AttentionPlan, plan_attention, stream_index, visible
from megallama.model.rope import rotary_table, table_dtype
from megallama.parallel.context.gather import GatherPlan, gather_seams
from megallama.parallel.context.ring import RingPlan, ring_seams
from megallama.parallel.context.split import SPLITS, Spans, stream_order
from megallama.parallel.context.ulysses import ulysses_seams


@dataclass(frozen=True)
class Stream:
    """One micro-batch's documents, as planning needs them."""

    model: ModelConfig
    position_ids: Tensor
    """`[S]` of the whole stream, on the device that computes."""
    cu_seqlens: Sequence[int]
    dtype: torch.dtype
    """Of activations."""
    packed_by: str = "auto"
    """`kernels.attention`."""

    def plan(self, queries: Spans | None = None) -> AttentionPlan:
        """For queries from some ranges, or all, and all keys."""
        return plan_attention(
            self.model,
            self.position_ids,
            self.cu_seqlens,
            dtype=self.dtype,
            queries=queries,
            packed_by=self.packed_by,
        )


def plan_for_rank(
    stream: Stream, layout: LayoutConfig, context: Axis
) -> tuple[Tensor | None, AttentionPlan]:
    """The tokens of the stream that a context rank computes (None: all), and its plan."""
    if context.size == 1:
        return None, stream.plan()
    method = layout.context_method
    split = "contiguous" if method == "ulysses" else layout.context_balance
    spans = SPLITS[split](stream.cu_seqlens, context.size)
    held = stream_index(spans[context.rank], stream.position_ids.device)
    return held, _PLANS[method](stream, spans, context.rank)


def _gather_plan(stream: Stream, spans: Sequence[Spans], rank: int) -> AttentionPlan:
    device = stream.position_ids.device
    order = torch.tensor(stream_order(spans), device=device)
    plan = stream.plan(spans[rank])
    return GatherPlan(**_parts(plan), stream_order=order, rank_order=order.argsort())


def _ring_plan(stream: Stream, spans: Sequence[Spans], rank: int) -> AttentionPlan:
    device = stream.position_ids.device
    longest = max(stop - start for start, stop in pairwise(stream.cu_seqlens))
    cos, sin = rotary_table(stream.model, longest, table_dtype(stream.dtype), device)
    positions = stream.position_ids[stream_index(spans[rank], device)].int()
    blocks = [spans[rank - n] for n in range(len(spans))]
    return RingPlan(
        cos=cos,
        sin=sin,
        positions=positions,
        key_positions=positions,
        dense_rows=None,
        segments=(),
        block_mask=None,
        chunks=None,
        visible=tuple(visible(stream.cu_seqlens, spans[rank], block, device) for block in blocks),
    )


def _ulysses_plan(stream: Stream, spans: Sequence[Spans], rank: int) -> AttentionPlan:
    """Heads are exchanged after rotation: each rank rotates its own tokens."""
    plan = stream.plan()
    held = stream_index(spans[rank], stream.position_ids.device)
    positions = plan.positions[held]
    return replace(plan, positions=positions, key_positions=positions)


_PLANS = {"all_gather": _gather_plan, "ring": _ring_plan, "ulysses": _ulysses_plan}


def _parts(plan: AttentionPlan) -> dict[str, Any]:
    return {field.name: getattr(plan, field.name) for field in fields(AttentionPlan)}


def context_seams(groups: ProcessGroupManager, method: str) -> dict[str, object]:
    """The seams that context parallelism fills, by field name; none over one rank."""
    context = groups.context
    if context.size == 1:
        return {}
    tensor = groups.tensor.group if groups.tensor.size > 1 else None
    if method == "all_gather":
        return gather_seams(tensor, context.group)
    return {"ring": ring_seams, "ulysses": ulysses_seams}[method](context.group)
