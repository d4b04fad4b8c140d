"""Llama 3 in plain PyTorch: one device, flat tokens, packed weights.

Shapes: T tokens of a micro-batch (documents back to back), d hidden, F ffn, V padded vocabulary,
Hq/Hkv heads, K head_dim. Head and feature counts come from the weights at hand, so that a rank with
a slice of every weight runs the same lines. Everything parallel enters through `Seams`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from megallama.config.schema import ModelConfig, vocab_rows
from megallama.model.attention import AttentionPlan
from megallama.model.kernels import Kernels
from megallama.model.seams import Seams


class Embedding(nn.Module):
    """Tokens to residual stream."""

    def __init__(self, config: ModelConfig, seams: Seams) -> None:
        super().__init__()
        self.seams = seams
        self.weight = nn.Parameter(torch.empty(vocab_rows(config), config.hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens [T]` -> `[T, d]`."""
        return self.seams.embed(tokens, self.seams.local("embed.weight", self.weight))


class Block(nn.Module):
    """A transformer block: pre-norm attention and SwiGLU (Shazeer 2020) on the stream."""

    def __init__(self, config: ModelConfig, seams: Seams, kernels: Kernels) -> None:
        super().__init__()
        d, K = config.hidden, config.head_dim
        self.seams, self.kernels = seams, kernels
        self.head_dim, self.eps = K, config.norm_eps
        self.attn_norm = nn.Parameter(torch.empty(d))
        self.wq = nn.Parameter(torch.empty(config.heads * K, d))
        # [Hkv, 2, K, d] with its leading dimensions folded: FSDP cuts rows, and Hkv are too few.
        self.wkv = nn.Parameter(torch.empty(config.kv_heads * 2 * K, d))
        self.wo = nn.Parameter(torch.empty(d, config.heads * K))
        self.ffn_norm = nn.Parameter(torch.empty(d))
        self.w13 = nn.Parameter(torch.empty(config.ffn, 2, d))
        self.w2 = nn.Parameter(torch.empty(d, config.ffn))
        self.wrapped: Callable[[Tensor, AttentionPlan], Tensor] | None = None
        """`compute` under activation checkpointing or torch.compile, if either is on."""

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """`x [T, d]` -> `[T, d]`."""
        return (self.wrapped or self.compute)(x, plan)

    def compute(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """The block's arithmetic, `[T, d]` -> `[T, d]`."""
        normed = self.kernels.rms_norm(x, self._local("attn_norm"), self.eps)
        out = self._attention(normed, plan)
        normed, x = self.kernels.add_rms_norm(out, x, self._local("ffn_norm"), self.eps)
        return x + self._feed_forward(normed)

    def _attention(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        q, kv = self.seams.enter_attention(x, self._local("wq"), self._local("wkv"), plan)
        q = q.unflatten(-1, (-1, self.head_dim))
        k, v = kv.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        q = self.kernels.rotate(q, plan.cos, plan.sin, plan.positions)
        k = self.kernels.rotate(k, plan.cos, plan.sin, plan.key_positions)
        out = self.seams.attend(q, k, v, plan)
        return self.seams.leave(out.flatten(1), self._local("wo"))

    def _feed_forward(self, x: Tensor) -> Tensor:
        activated = self.kernels.swiglu(self.seams.enter, x, self._local("w13"))
        return self.seams.leave(activated, self._local("w2"))

    def _local(self, name: str) -> Tensor:
        return self.seams.local(name, getattr(self, name))


class Head(nn.Module):
    """Final norm and vocabulary projection."""

    def __init__(
        self, config: ModelConfig, seams: Seams, kernels: Kernels, tied_to: Embedding | None
    ) -> None:
        super().__init__()
        self.seams, self.kernels = seams, kernels
        self.eps, self.vocab = config.norm_eps, config.vocab
        self.norm = nn.Parameter(torch.empty(config.hidden))
        rows = vocab_rows(config)
        self.weight = tied_to.weight if tied_to else nn.Parameter(torch.empty(rows, config.hidden))

    def forward(self, x: Tensor, labels: Tensor | None, loss_scale: Tensor | None) -> Tensor:
        """`x [T, d]`, `labels [T]` -> the loss `[]`; without labels, logits `[T, vocab]`.

        Under tensor parallelism logits are this rank's columns, padding included.
        """
        weight = self.seams.local("head.weight", self.weight)
        normed = self.kernels.rms_norm(x, self.seams.local("head.norm", self.norm), self.eps)
        if labels is None:
            (logits,) = self.seams.enter(normed, weight)
            return logits[:, : self.vocab]
        assert loss_scale is not None
        ops = self.kernels.loss
        return self.seams.loss(normed, weight, labels, loss_scale, self.vocab, ops)


@dataclass(frozen=True)
class Part:
    """Consecutive layers that run together: all of a model, or one stage of a pipeline."""

    layers: range
    first: bool = True
    """The embedding comes before them."""
    last: bool = True
    """The final norm and the head come after them."""


class Llama(nn.Module):
    """The whole model, or the parts of it that one pipeline rank holds.

    Parameter names do not depend on the layout: layer 3 is `layers.3` on whatever rank. A tied
    weight is `embed.weight` on a rank that has only the head, too.

    Args:
        config: shape of the whole model.
        seams: what this rank does differently.
        parts: what this rank holds, in the order of the layers; everything by default.
        kernels: what computes the fused operations; torch by default.

    """

    def __init__(
        self,
        config: ModelConfig,
        seams: Seams | None = None,
        parts: Sequence[Part] | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__()
        seams, kernels = seams or Seams(), kernels or Kernels()
        self.parts = tuple(parts or [Part(range(config.layers))])
        first, last = (any(getattr(p, end) for p in self.parts) for end in ("first", "last"))
        holds_embedding = first or (last and config.tie_embeddings)
        self.embed = Embedding(config, seams) if holds_embedding else None
        layers = chain.from_iterable(part.layers for part in self.parts)
        self.layers = nn.ModuleDict({str(i): Block(config, seams, kernels) for i in layers})
        tied_to = self.embed if config.tie_embeddings else None
        self.head = Head(config, seams, kernels, tied_to) if last else None

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        labels: Tensor | None = None,
        loss_scale: Tensor | None = None,
        part: int = 0,
    ) -> Tensor:
        """Run one part.

        Args:
            x: tokens `[T]` int64 for the first part of the model, else the stream `[T, d]`.
            plan: of this micro-batch.
            labels: `[T]` int64, for the last part of the model when the loss is wanted.
            loss_scale: `[]`, with labels: 1 / valid tokens of the global batch.
            part: which of `parts`.

        Returns:
            The stream `[T, d]`; of the model's last part the scaled sum of the token losses `[]`,
            in nats, at least float32, or logits `[T, vocab]` if there are no labels.

        """
        this = self.parts[part]
        if this.first:
            assert self.embed is not None
            x = self.embed(x)
        for i in this.layers:
            x = self.layers[str(i)](x, plan)
        if not this.last:
            return x
        assert self.head is not None
        return self.head(x, labels, loss_scale)
