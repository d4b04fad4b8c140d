"""Attention of packed documents as variable-length FlashAttention calls, one for each chunk.

A chunk is a run of queries whose documents' keys lie one after the other in the stream: all of the
stream, or one of the two parts that a context rank computes. Within a document the last query sees
all keys of the call, each query before it one less: FlashAttention's causal mask, which is aligned
at the bottom right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

CAUSAL = (-1, 0)
"""Window: any key before a query, none behind it."""
_SAYS_SO = "enable_gqa" in signature(varlen_attn).parameters
GROUPED: dict[str, Any] = {"enable_gqa": True} if _SAYS_SO else {}
"""Fewer key heads than query heads; torch 2.11 takes them without being told."""
DTYPES = (torch.bfloat16, torch.float16)
"""What FlashAttention computes in."""


def use_flash_attention_3() -> None:
    """From here on torch's FlashAttention is that of the package `flash_attn_interface`."""
    activate_flash_attention_impl("FA3")


class Segment(NamedTuple):
    """Queries of one document and the keys they may see: the last query sees all of these, each
    query before it one less.
    """

    queries: tuple[int, int]
    """Start and stop among the queries at hand."""
    keys: tuple[int, int]
    """Start and stop in the stream."""


@dataclass(frozen=True)
class Chunk:
    """One call."""

    queries: slice
    keys: slice
    cu_seqlens_q: Tensor
    """`[documents + 1]` int32, from the chunk's first query."""
    cu_seqlens_k: Tensor
    """The same from its first key."""
    longest_q: int
    longest_k: int


def runs_of(segments: Sequence[Segment]) -> list[list[Segment]]:
    """The fewest calls that compute these segments, in their order."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if runs and runs[-1][-1].keys[1] == segment.keys[0]:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def chunks_of(runs: Sequence[Sequence[Segment]], device: torch.device) -> tuple[Chunk, ...]:
    """What the calls are told."""
    return tuple(_chunk(run, device) for run in runs)


def _chunk(run: Sequence[Segment], device: torch.device) -> Chunk:
    queries = [stop - start for (start, stop), _ in run]
    keys = [stop - start for _, (start, stop) in run]
    return Chunk(
        queries=slice(run[0].queries[0], run[-1].queries[1]),
        keys=slice(run[0].keys[0], run[-1].keys[1]),
        cu_seqlens_q=torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=device),
        cu_seqlens_k=torch.tensor([0, *accumulate(keys)], dtype=torch.int32, device=device),
        longest_q=max(queries),
        longest_k=max(keys),
    )


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """`q [T, Hq, K]`, `k` and `v [S, Hkv, K]` -> `[T, Hq, K]`."""
    outs = [_one_call(q[c.queries], k[c.keys], v[c.keys], c) for c in chunks]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _one_call(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk) -> Tensor:
    out = varlen_attn(
        q,
        k,
        v,
        chunk.cu_seqlens_q,
        chunk.cu_seqlens_k,
        chunk.longest_q,
        chunk.longest_k,
        window_size=CAUSAL,
        **GROUPED,
    )
    assert isinstance(out, Tensor)
    return out
