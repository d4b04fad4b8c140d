"""The head's product with its loss, whose forward may compute gradients: so all of it is timed as
one, too, and only that has a floor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from case import (
    COMPILED,
    EAGER,
    LIGER,
    OURS,
    Case,
    Run,
    Way,
    backward_run,
    compiled,
    forward_run,
    liger,
)
from megallama_kernels.linear_cross_entropy import FUSED, PLAIN, LossOps, linear_cross_entropy
from shapes import Shape
from torch import Tensor

CHUNK_ROWS = 4096
"""What training uses (`LOSS_CHUNK` in megallama/config/schema.py)."""
EXACT_ROWS = 1024
"""Rows of logits that exist in float32 at a time."""
BYTES_PER_LOGIT = 2 + 4
"""Statistics read a bfloat16, the gradient reads and writes one; products count as FLOPs."""


def linear_and_cross_entropy(shape: Shape, device: torch.device) -> Iterator[Case]:
    """The mean loss of `x [T, d] @ weight [V, d].T` against labels, and both gradients.

    `eager` has all logits at once, in float32 for the loss, as Hugging Face computes it; `eager in
    chunks` is the module's reference.
    """
    tokens, hidden, vocab = shape.tokens, shape.hidden, shape.vocab
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16) * hidden**-0.5
    labels = torch.randint(vocab, (tokens,), device=device)
    scale = torch.tensor(1 / tokens, device=device)

    def chunked(ops: LossOps) -> Way:
        return Way(
            lambda x, weight: linear_cross_entropy(
                x, weight, labels, scale, vocab=vocab, chunk_rows=CHUNK_ROWS, ops=ops
            )
        )

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels)

    ways = {
        OURS: chunked(FUSED),
        EAGER: Way(plain),
        "eager in chunks": chunked(PLAIN),
        COMPILED: Way(compiled(plain, device)),
    }
    if theirs := liger():
        ways[LIGER] = Way(
            lambda x, weight: theirs.liger_fused_linear_cross_entropy(x, weight, labels)
        )
    inputs, upstream = [x, weight], [torch.ones((), device=device)]
    loss, *gradients = exact = _exact(x, weight, labels)

    def case(what: str, expected: Sequence[Tensor], runs: dict[str, Run], floor: bool) -> Case:
        logits = tokens * vocab
        moved, flops = BYTES_PER_LOGIT * logits, 6.0 * logits * hidden
        op = "linear_cross_entropy"
        return Case(op, what, shape.name, expected, runs, moved if floor else None, flops)

    forward = {name: forward_run(way, inputs) for name, way in ways.items()}
    yield case("forward", [loss], forward, floor=False)
    backward = {name: backward_run(way, inputs, upstream) for name, way in ways.items()}
    yield case("backward", gradients, backward, floor=False)
    both = {name: _both_run(way, inputs) for name, way in ways.items()}
    yield case("both", exact, both, floor=True)


def _both_run(way: Way, inputs: Sequence[Tensor]) -> Run:
    def run(leaves: Sequence[Tensor]) -> list[Tensor]:
        loss = way.function(*leaves)
        assert isinstance(loss, Tensor)
        return [loss, *torch.autograd.grad(loss, leaves)]

    return Run(lambda: [x.detach().requires_grad_() for x in inputs], run)


def _exact(x: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss, dx and dW by float32 arithmetic, in which products take seconds rather than minutes."""
    wide, tokens = weight.float(), len(x)
    loss, dx = wide.new_zeros(()), torch.empty(x.shape, device=x.device)
    dweight = torch.zeros_like(wide)
    for start in range(0, tokens, EXACT_ROWS):
        rows = slice(start, start + EXACT_ROWS)
        logits = (x[rows].float() @ wide.t()).requires_grad_()
        part = F.cross_entropy(logits, labels[rows], reduction="sum") / tokens
        (dlogits,) = torch.autograd.grad(part, logits)
        loss += part.detach()
        dx[rows] = dlogits @ wide
        dweight += dlogits.t() @ x[rows].float()
    return [loss, dx, dweight]
