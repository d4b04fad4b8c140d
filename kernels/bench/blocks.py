"""What a block computes between its products: norms, activation, rotation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from case import COMPILED, EAGER, LIGER, OURS, Case, Way, compiled, forward_and_backward, liger
from megallama_kernels import rms_norm as norms
from megallama_kernels import rope, swiglu
from shapes import Shape
from torch import Tensor

ELEMENT = 2
"""Bytes of a bfloat16."""


def rms_norm(shape: Shape, device: torch.device) -> Iterator[Case]:
    """`x [T, d]`: read and written once; backward reads two and writes one."""
    eps = shape.norm_eps

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return norms.reference(x, weight, eps)

    ways = {
        OURS: Way(lambda x, weight: norms.rms_norm(x, weight, eps)),
        EAGER: Way(plain),
        COMPILED: Way(compiled(plain, device)),
    }
    if theirs := liger():
        ways[LIGER] = Way(lambda x, weight: theirs.liger_rms_norm(x, weight, eps))
    x, dy = (_normal(device, shape.tokens, shape.hidden) for _ in range(2))
    moved = ELEMENT * x.numel()
    yield from forward_and_backward(
        "rms_norm",
        shape.name,
        ways,
        [x, _weight(shape, device)],
        [dy],
        plain,
        (2 * moved, 3 * moved),
    )


def add_rms_norm(shape: Shape, device: torch.device) -> Iterator[Case]:
    """`x` and residual `[T, d]` are read, their sum and its norm written; backward as much."""
    eps = shape.norm_eps

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norms.add_reference(x, residual, weight, eps)

    ways = {
        OURS: Way(lambda x, residual, weight: norms.add_rms_norm(x, residual, weight, eps)),
        EAGER: Way(plain),
        COMPILED: Way(compiled(plain, device)),
    }
    if theirs := liger():
        ways[LIGER] = Way(
            lambda x, residual, weight: theirs.liger_fused_add_rms_norm(x, residual, weight, eps)
        )
    x, residual, dy, dstream = (_normal(device, shape.tokens, shape.hidden) for _ in range(4))
    inputs = [x, residual, _weight(shape, device)]
    moved = 4 * ELEMENT * x.numel()
    yield from forward_and_backward(
        "add_rms_norm", shape.name, ways, inputs, [dy, dstream], plain, (moved, moved)
    )


def packed_swiglu(shape: Shape, device: torch.device) -> Iterator[Case]:
    """`[T, F, 2]` -> `[T, F]`; backward reads three elements a feature and writes two.

    Liger takes gate and up apart, contiguous, and writes their gradients over them: it gets that
    layout, and copies.
    """
    packed, dy = (
        _normal(device, shape.tokens, shape.ffn, 2),
        _normal(device, shape.tokens, shape.ffn),
    )
    ways = {
        OURS: Way(swiglu.swiglu),
        EAGER: Way(swiglu.reference),
        COMPILED: Way(compiled(swiglu.reference, device)),
    }
    if theirs := liger():
        ways[LIGER] = Way(
            theirs.liger_swiglu,
            lambda: [x.contiguous() for x in packed.unbind(-1)],
            lambda gradients: [torch.stack([*gradients], -1)],
        )
    moved = ELEMENT * dy.numel()
    yield from forward_and_backward(
        "swiglu", shape.name, ways, [packed], [dy], swiglu.reference, (3 * moved, 5 * moved)
    )


def rotation(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Q `[T, Hq, K]`, and k as it lies in the packed projection `[T, Hkv, 2, K]`, read and written.

    Positions restart in the middle, as with two packed documents. Liger has no positions, only a
    table of `[T, K]` by token, and turns contiguous tensors in place: it gets those, as copies.
    """
    half = shape.head_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=device) / half
    position = torch.arange(shape.tokens, dtype=torch.int32, device=device) % (shape.tokens // 2)
    angle = torch.outer(torch.arange(shape.tokens // 2, device=device), shape.rope_theta**-exponent)
    cos, sin = angle.cos(), angle.sin()
    narrow_cos, narrow_sin = cos.float(), sin.float()

    def exact(q: Tensor, k: Tensor) -> list[Tensor]:
        return [rope.reference(x, cos, sin, position) for x in (q, k)]

    def plain(q: Tensor, k: Tensor) -> list[Tensor]:
        return [rope.reference(x, narrow_cos, narrow_sin, position) for x in (q, k)]

    def ours(q: Tensor, k: Tensor) -> list[Tensor]:
        return [rope.rotate(x, narrow_cos, narrow_sin, position) for x in (q, k)]

    q = _normal(device, shape.tokens, shape.heads, shape.head_dim)
    packed = _normal(device, shape.tokens, shape.kv_heads, 2, shape.head_dim)
    inputs = [q, packed[:, :, 0]]
    upstream = [_normal(device, *x.shape) for x in inputs]
    ways = {OURS: Way(ours), EAGER: Way(plain), COMPILED: Way(compiled(plain, device))}
    if theirs := liger():
        tables = [torch.cat([x, x], -1)[position][None] for x in (narrow_cos, narrow_sin)]

        def turned(q: Tensor, k: Tensor) -> Sequence[Tensor]:
            by_head = [x.transpose(0, 1)[None] for x in (q, k)]
            return [x[0].transpose(0, 1) for x in theirs.liger_rope(*by_head, *tables)]

        ways[LIGER] = Way(
            turned, lambda: [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        )
    moved = 2 * ELEMENT * sum(x.numel() for x in inputs)
    yield from forward_and_backward(
        "rope", shape.name, ways, inputs, upstream, exact, (moved, moved)
    )


def _normal(device: torch.device, *size: int) -> Tensor:
    return torch.randn(size, device=device, dtype=torch.bfloat16)


def _weight(shape: Shape, device: torch.device) -> Tensor:
    return 1 + 0.1 * _normal(device, shape.hidden)
