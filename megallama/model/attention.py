"""Causal grouped-query attention over packed documents.

Dense micro-batches (rows of one length) go to scaled_dot_product_attention. Packed ones go to
FlexAttention on a GPU, and document by document on CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megallama.config.schema import ModelConfig
from megallama.model.precision import at_least_float32
from megallama.model.rope import rotary_table


@dataclass(frozen=True)
class AttentionPlan:
    """All that attention needs to know of one micro-batch, made once on the host for all layers."""

    cos: Tensor
    """`[T, 1, head_dim/2]`, float32 or float64."""
    sin: Tensor
    dense_rows: int | None
    """Rows of equal length, each one document; None if documents differ in length."""
    cu_seqlens: tuple[int, ...]
    """Document borders 0 … T."""
    block_mask: BlockMask | None
    """Same-document-and-causal blocks for FlexAttention; None on CPU or when dense."""


def plan_attention(
    config: ModelConfig,
    position_ids: Tensor,
    cu_seqlens: Sequence[int],
    *,
    dtype: torch.dtype,
) -> AttentionPlan:
    """Plan one micro-batch.

    Args:
        config: shape of the model.
        position_ids: `[T]` on the device that computes.
        cu_seqlens: document borders 0 … T, on the host.
        dtype: of activations; the rotary table takes it or float32, whichever is wider.

    """
    lengths = {stop - start for start, stop in pairwise(cu_seqlens)}
    dense = len(lengths) == 1
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = rotary_table(config, position_ids, table_dtype)
    packed_on_gpu = position_ids.is_cuda and not dense
    return AttentionPlan(
        cos=cos,
        sin=sin,
        dense_rows=len(cu_seqlens) - 1 if dense else None,
        cu_seqlens=tuple(cu_seqlens),
        block_mask=_document_mask(cu_seqlens, position_ids.device) if packed_on_gpu else None,
    )


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
    if plan.block_mask is not None:
        return _flex(q, k, v, plan.block_mask)
    return _document_by_document(q, k, v, plan)


def _causal_rows(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


@torch.compiler.disable  # borders differ from batch to batch: each would be compiled anew
def _document_by_document(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    sizes = [stop - start for start, stop in pairwise(plan.cu_seqlens)]
    documents = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_causal_rows(*document, rows=1) for document in documents])


def _document_mask(cu_seqlens: Sequence[int], device: torch.device) -> BlockMask:
    T = cu_seqlens[-1]
    starts = torch.zeros(T, dtype=torch.int32)
    starts[[border for border in cu_seqlens[1:] if border < T]] = 1
    document = starts.cumsum(0).to(device)

    def same_document_and_causal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (i >= j)

    return create_block_mask(same_document_and_causal, None, None, T, T, device=str(device))


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out = _compiled_flex()(*by_head, block_mask=block_mask, enable_gqa=True)
    return out[0].transpose(0, 1)


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
