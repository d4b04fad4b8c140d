"""Where parallelism meets the model: a few callables whose defaults do nothing but the arithmetic.

The model calls these and knows no more. `megallama.parallel` supplies versions that communicate.
Letters: T tokens of one rank's micro-batch, d hidden, F ffn, V padded vocabulary, H heads,
K head_dim; `t` tensor-parallel ranks; S tokens whose keys attention sees: T, or all those of the
context-parallel group.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from megallama_kernels.cross_entropy import IGNORED_LABEL as IGNORED_LABEL
from megallama_kernels.linear_cross_entropy import LossOps, linear_cross_entropy
from torch import Tensor

from megallama.config.schema import LOSS_CHUNK
from megallama.model.attention import AttentionPlan, attend


def as_it_is(_name: str, parameter: Tensor) -> Tensor:
    """The parameter itself."""
    return parameter


def project(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`x [T, d]` times each `weight [n, d]`: a tuple of `[T, n]`."""
    return tuple(F.linear(x, weight) for weight in weights)


def project_attention(
    x: Tensor, wq: Tensor, wkv: Tensor, _plan: AttentionPlan
) -> tuple[Tensor, ...]:
    """`x [T, d]` -> `q [T, Hq*K]`, `kv [T, Hkv*2*K]`."""
    return project(x, wq, wkv)


def loss(
    x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, vocab: int, ops: LossOps
) -> Tensor:
    """`scale` times the sum of the token losses in nats, `[]`, at least float32.

    Args:
        x: `[T, d]`, normed.
        weight: `[V, d]`; rows from `vocab` on are padding and take no part.
        labels: `[T]` int64, `IGNORED_LABEL` where no loss is taken.
        scale: `[]`.
        vocab: tokens that exist.
        ops: the passes over logits.

    """
    return linear_cross_entropy(
        x, weight, labels, scale, vocab=vocab, chunk_rows=LOSS_CHUNK, ops=ops
    )


@dataclass(frozen=True)
class Seams:
    """The places where a rank's work differs from a single device's."""

    local: Callable[[str, Tensor], Tensor] = as_it_is
    """`(name, parameter)` -> the part this rank computes with; names as in `placements.py`."""
    enter: Callable[..., tuple[Tensor, ...]] = project
    """`(x [T/t, d], *weights)` -> projections of all T tokens onto this rank's features."""
    enter_attention: Callable[[Tensor, Tensor, Tensor, AttentionPlan], tuple[Tensor, ...]] = (
        project_attention
    )
    """`(x [T/t, d], wq, wkv, plan)` -> `q [T, Hq/t*K]`, `kv [S, Hkv/t*2*K]`."""
    leave: Callable[[Tensor, Tensor], Tensor] = F.linear
    """`(x [T, n/t], weight [d, n/t])` -> `[T/t, d]`, summed over the ranks that hold features."""
    attend: Callable[[Tensor, Tensor, Tensor, AttentionPlan], Tensor] = attend
    """`(q [T, Hq, K], k, v [S, Hkv, K], plan)` -> `[T, Hq, K]`."""
    embed: Callable[[Tensor, Tensor], Tensor] = F.embedding
    """`(tokens [T], weight [V/t, d])` -> `[T/t, d]`."""
    loss: Callable[[Tensor, Tensor, Tensor, Tensor, int, LossOps], Tensor] = loss
    """`(x [T/t, d], weight [V/t, d], labels [T], scale [], vocab, ops)` -> the loss `[]`, the same
    on all t ranks."""
