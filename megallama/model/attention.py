"""Causal grouped-query attention over packed documents.

Dense micro-batches (rows of one length) go to scaled_dot_product_attention. Packed ones go on a GPU
to FlexAttention, or to variable-length FlashAttention where a context rank's queries make few
calls of it, and segment by segment on CPU: each segment is a run of queries from one document and
the keys of that document up to the last of them.

Queries may be a part of the stream, as under context parallelism: `queries` are the ranges of the
stream whose queries are at hand, one after the other.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megallama_kernels.language import at_least_float32
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from megallama.config.schema import ModelConfig
from megallama.model.rope import rotary_table, table_dtype
from megallama.model.varlen import DTYPES, Chunk, Segment, attend_in_chunks, chunks_of, runs_of

HEAD_AND_TAIL = 2
"""Calls for a context rank's two parts of the stream."""


@dataclass(frozen=True)
class AttentionPlan:
    """All that attention needs to know of one micro-batch, made once on the host for all layers."""

    cos: Tensor
    """`[S, head_dim/2]` by position, float32 or float64."""
    sin: Tensor
    positions: Tensor
    """`[T]` int32, of the tokens whose queries are at hand."""
    key_positions: Tensor
    """The same of the tokens whose keys the block projects or receives."""
    dense_rows: int | None
    """Rows of equal length, each one document; None if documents differ in length."""
    segments: tuple[Segment, ...]
    """What each query sees, on CPU."""
    block_mask: BlockMask | None
    """Same-document-and-causal blocks for FlexAttention; None if that is not what computes."""
    chunks: tuple[Chunk, ...] | None
    """Calls of variable-length FlashAttention; None if that is not what computes."""


def plan_attention(
    config: ModelConfig,
    position_ids: Tensor,
    cu_seqlens: Sequence[int],
    *,
    dtype: torch.dtype,
    queries: Sequence[range] | None = None,
    packed_by: str = "auto",
) -> AttentionPlan:
    """Plan one micro-batch.

    Args:
        config: shape of the model.
        position_ids: `[T]` of the whole stream, each below its document's length, on the device
            that computes.
        cu_seqlens: document borders 0 … T, on the host.
        dtype: of activations; the rotary table takes it or float32, whichever is wider.
        queries: ranges of the stream whose queries are at hand, ascending; all by default.
        packed_by: what computes packed documents on a GPU, as `kernels.attention` says.

    """
    lengths = {stop - start for start, stop in pairwise(cu_seqlens)}
    dense = len(lengths) == 1 and queries is None
    cos, sin = rotary_table(config, max(lengths), table_dtype(dtype), position_ids.device)
    positions = key_positions = position_ids.int()
    if queries is not None:
        positions = positions[stream_index(queries, position_ids.device)]
    queries = [range(cu_seqlens[-1])] if queries is None else queries
    segments, device = tuple(_segments(cu_seqlens, queries)), position_ids.device
    mask, chunks = None, None
    if position_ids.is_cuda and not dense:
        runs = runs_of(segments) if dtype in DTYPES else []
        if _in_chunks(packed_by, len(runs), partly=len(queries) > 1):
            chunks = chunks_of(runs, device)
        else:
            mask = block_mask(cu_seqlens, queries, [range(cu_seqlens[-1])], device)
    return AttentionPlan(
        cos=cos,
        sin=sin,
        positions=positions,
        key_positions=key_positions,
        dense_rows=len(cu_seqlens) - 1 if dense else None,
        segments=segments,
        block_mask=mask,
        chunks=chunks,
    )


def _in_chunks(packed_by: str, calls: int, *, partly: bool) -> bool:
    """Whether variable-length FlashAttention computes it; no calls if it cannot."""
    if packed_by == "auto":
        return partly and 0 < calls <= HEAD_AND_TAIL
    return packed_by in ("varlen", "fa3") and calls > 0


def stream_index(ranges: Sequence[range], device: torch.device) -> Tensor:
    """Places in the stream of the tokens in some ranges of it, int64."""
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges]).to(device)


def _segments(cu_seqlens: Sequence[int], queries: Sequence[range]) -> Iterator[Segment]:
    at = 0
    for span in queries:
        document = bisect_right(cu_seqlens, span.start) - 1
        first = span.start
        while first < span.stop:
            last = min(cu_seqlens[document + 1], span.stop)
            yield Segment((at, at + last - first), (cu_seqlens[document], last))
            at, first, document = at + last - first, last, document + 1


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Each token attends to the earlier tokens of its document and to itself.

    Args:
        q: `[T, Hq, head_dim]`, rotated.
        k: `[T, Hkv, head_dim]`, rotated.
        v: `[T, Hkv, head_dim]`.
        plan: of this micro-batch.

    Returns:
        `[T, Hq, head_dim]`.

    """
    if plan.dense_rows is not None:
        return _causal_rows(q, k, v, plan.dense_rows)
    if plan.chunks is not None:
        return attend_in_chunks(q, k, v, plan.chunks)
    if plan.block_mask is not None:
        return flex(q, k, v, plan.block_mask)
    return _segment_by_segment(q, k, v, plan)


def _causal_rows(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


@torch.compiler.disable  # borders differ from batch to batch: each would be compiled anew
def _segment_by_segment(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    return torch.cat([_one_segment(q, k, v, segment) for segment in plan.segments])


def _one_segment(q: Tensor, k: Tensor, v: Tensor, segment: Segment) -> Tensor:
    queries, keys = slice(*segment.queries), slice(*segment.keys)
    q, k, v = (x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys]))
    length, seen = q.shape[2], k.shape[2]
    square = length == seen
    mask = None if square else torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=True)
    return out[0].transpose(0, 1)


def block_mask(
    cu_seqlens: Sequence[int],
    queries: Sequence[range],
    keys: Sequence[range],
    device: torch.device,
) -> BlockMask:
    """FlexAttention's mask for queries and keys from some ranges of the stream."""
    document = documents(cu_seqlens).to(device)
    q_at, k_at = stream_index(queries, device), stream_index(keys, device)
    q_document, k_document = document[q_at], document[k_at]

    def same_document_and_causal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (q_document[i] == k_document[j]) & (q_at[i] >= k_at[j])

    return create_block_mask(
        same_document_and_causal, None, None, len(q_at), len(k_at), device=str(device)
    )


def documents(cu_seqlens: Sequence[int]) -> Tensor:
    """The document each token of the stream is in, `[T]` int32."""
    lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
    numbers = torch.arange(len(lengths), dtype=torch.int32)
    return numbers.repeat_interleave(torch.tensor(lengths))


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """FlexAttention, compiled; shapes as `attend`."""
    by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out = _compiled_flex()(*by_head, block_mask=block_mask, enable_gqa=True)
    return out[0].transpose(0, 1)


Visible = Tensor | BlockMask
"""Which queries see which keys: `[T, S]` bool on CPU, a block mask on a GPU."""


def visible(
    cu_seqlens: Sequence[int], queries: Sequence[range], keys: Sequence[range], device: torch.device
) -> Visible:
    """Which queries see which keys, both from some ranges of the stream."""
    if device.type == "cuda":
        return block_mask(cu_seqlens, queries, keys, device)
    document = documents(cu_seqlens)
    q_at, k_at = stream_index(queries, device), stream_index(keys, device)
    return (document[q_at][:, None] == document[k_at]) & (q_at[:, None] >= k_at)


def attend_in_part(q: Tensor, k: Tensor, v: Tensor, seen: Visible) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, such that results over all of them can be added up.

    Args:
        q: `[T, Hq, head_dim]`, rotated.
        k: `[S, Hkv, head_dim]`, rotated.
        v: `[S, Hkv, head_dim]`.
        seen: of these queries and keys.

    Returns:
        `[T, Hq, head_dim]` and the log-sum-exp of the scores `[T, Hq]`, both at least float32:
        0 and -inf where a query sees no key.

    """
    if isinstance(seen, BlockMask):
        by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out, aux = _compiled_flex()(
            *by_head, block_mask=seen, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
        return at_least_float32(out[0].transpose(0, 1)), aux.lse[0].transpose(0, 1)
    q, k, v = (at_least_float32(x) for x in (q, k, v))
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("qhgk,shk->hgqs", grouped, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    log_sum_exp = scores.logsumexp(-1, keepdim=True)
    weights = (scores - log_sum_exp.masked_fill(log_sum_exp.isinf(), 0.0)).exp()
    out = torch.einsum("hgqs,shk->qhgk", weights, v).flatten(1, 2)
    return out, log_sum_exp[..., 0].permute(2, 0, 1).flatten(1)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """The definition, with the whole score matrix: what the fast paths are tested against."""
    T, heads, head_dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    borders = torch.tensor(cu_seqlens[1:], device=q.device)
    token = torch.arange(T, device=q.device)
    document = torch.bucketize(token, borders, right=True)
    visible = (document[:, None] == document[None]) & (token[:, None] >= token[None])
    scores = torch.einsum("qhk,shk->hqs", at_least_float32(q), at_least_float32(k)) * head_dim**-0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqs,shk->qhk", weights, at_least_float32(v)).to(q.dtype)
