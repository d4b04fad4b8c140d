"""What a training step moves: collectives and messages in closed form. No torch.

docs/communication.md derives the formulas; `verify` counts what really reaches torch.distributed
and tests hold the two equal. Bytes are those of the whole buffer: what an all-gather yields, what
a reduce-scatter takes, what an all-reduce reduces, what an all-to-all exchanges, one message.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

from megallama.config.schema import LOSS_CHUNK, Config, frees_weights, vocab_rows
from megallama.parallel.pipeline.stages import layers_of_stages, micro_batches_of_step
from megallama.parallel.placements import placement

COMPUTE_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
MASTER_BYTES = {"bf16": 4, "fp32": 4, "fp64": 8}
"""Of master weights, of gradients when they are reduced, and of what is at least float32."""
COUNT_BYTES = 16
"""Valid tokens and attended pairs, int64."""
WORLD_NUMBERS = 3
"""Loss, squared norm, and whether a rank was asked to stop."""


@dataclass(frozen=True)
class Volume:
    """Calls of one kind on one axis in one step of one rank, and their bytes together."""

    axis: str
    kind: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class _Sizes:
    """What the formulas are made of."""

    config: Config
    stages: tuple[range, ...]
    """Layers of this rank's stages."""
    first: bool
    """Has the embedding."""
    last: bool
    """Has the head."""
    sends_forward: int
    """Of its stages, those that are not the pipeline's last."""
    sends_back: int
    """Those that are not its first."""

    @property
    def layers(self) -> int:
        return sum(map(len, self.stages))

    @property
    def micro_batches(self) -> int:
        return micro_batches_of_step(self.config)

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one context rank, all tensor ranks together."""
        layout = self.config.layout
        return self.config.data.seq_len * layout.micro_batch // layout.context

    @property
    def compute(self) -> int:
        return COMPUTE_BYTES[self.config.train.precision]

    @property
    def master(self) -> int:
        return MASTER_BYTES[self.config.train.precision]

    @property
    def stream(self) -> int:
        """Bytes of `[T, d]`."""
        return self.tokens * self.config.model.hidden * self.compute

    @property
    def zero3(self) -> bool:
        return frees_weights(self.config)

    @property
    def recomputed(self) -> bool:
        return self.config.train.activation_checkpointing in ("selective", "full")

    @property
    def reductions(self) -> int:
        """How often a step reduces each gradient."""
        return self.micro_batches if self.zero3 else 1


def step_volume(config: Config, pipeline_rank: int) -> list[Volume]:
    """What one rank takes part in during one step, by axis and kind, in order.

    Args:
        config: with `layout.data_shard` resolved.
        pipeline_rank: which rank's.

    """
    layout, stages = config.layout, layers_of_stages(config)
    mine = range(pipeline_rank, len(stages), layout.pipeline)
    sizes = _Sizes(
        config=config,
        stages=tuple(stages[s] for s in mine),
        first=mine[0] == 0,
        last=mine[-1] == len(stages) - 1,
        sends_forward=sum(s < len(stages) - 1 for s in mine),
        sends_back=sum(s > 0 for s in mine),
    )
    calls: Counter[tuple[str, str]] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    for axis, kind, times, size in _terms(sizes):
        if times:
            calls[axis, kind] += times
            moved[axis, kind] += times * size
    return [Volume(*key, calls[key], moved[key]) for key in sorted(calls)]


_Term = tuple[str, str, int, int]
"""Axis, kind, calls, bytes of each."""


def _terms(sizes: _Sizes) -> Iterator[_Term]:
    layout = sizes.config.layout
    if layout.tensor > 1:
        yield from _tensor(sizes)
    if layout.context > 1:
        yield from _CONTEXT[layout.context_method](sizes)
    if layout.pipeline > 1:
        yield from _pipeline(sizes)
    yield from _fsdp(sizes)
    yield "data", "all-reduce", 1, COUNT_BYTES
    yield "world", "all-reduce", 1, WORLD_NUMBERS * sizes.master


def _tensor(sizes: _Sizes) -> Iterator[_Term]:
    """Enter: gather, and in backward gather and reduce-scatter. Leave: reduce-scatter, and in
    backward gather. Attention and feed-forward each; the embedding leaves. The head gathers once:
    its gradients are taken in forward.
    """
    T, M, L = sizes.tokens, sizes.micro_batches, sizes.layers
    enters = M * 2 * L
    leaves = M * (2 * L + sizes.first)
    again = M * L if sizes.recomputed else 0
    heads = M * sizes.last
    # Recomputation stops before a block's last product: nothing after it was saved.
    yield "tensor", "all-gather", 2 * enters + leaves + 2 * again + heads, sizes.stream
    yield "tensor", "reduce-scatter", enters + leaves + again + heads, sizes.stream
    # Of each chunk of tokens three numbers from every rank: largest logit, sum, target.
    of_token = 3 * sizes.config.layout.tensor * sizes.master
    yield "tensor", "all-gather", heads * (T // LOSS_CHUNK), LOSS_CHUNK * of_token
    if T % LOSS_CHUNK:
        yield "tensor", "all-gather", heads, T % LOSS_CHUNK * of_token
    # Gradients that several micro-batches add up to are in the reduction's dtype already.
    gradient = sizes.master if sizes.reductions < M else sizes.compute
    for name, shape in _parameters(sizes):
        if _replicated(name, sizes):
            yield "tensor", "all-reduce", sizes.reductions, prod(shape) * gradient


def _gathered(sizes: _Sizes) -> Iterator[_Term]:
    kv = sizes.tokens * sizes.config.layout.context * 2 * _kv_features(sizes) * sizes.compute
    passes = sizes.layers * sizes.micro_batches
    yield "context", "all-gather", passes * (2 if sizes.recomputed else 1), kv
    yield "context", "reduce-scatter", passes, kv


def _ring(sizes: _Sizes) -> Iterator[_Term]:
    block = sizes.tokens * 2 * _kv_features(sizes)
    passes = sizes.layers * sizes.micro_batches
    ranks = sizes.config.layout.context
    rounds = 3 if sizes.recomputed else 2
    yield "context", "message", passes * rounds * (ranks - 1), block * sizes.compute
    yield "context", "message", passes * ranks, block * sizes.master


def _exchanged(sizes: _Sizes) -> Iterator[_Term]:
    layout, model = sizes.config.layout, sizes.config.model
    passes = sizes.layers * sizes.micro_batches
    rounds = 3 if sizes.recomputed else 2
    q = sizes.tokens * model.heads // layout.tensor * model.head_dim * sizes.compute
    copies = max(1, layout.context * model.head_dim // _kv_features(sizes))
    kv = sizes.tokens * 2 * _kv_features(sizes) * copies * sizes.compute
    yield "context", "all-to-all", passes * rounds, kv
    yield "context", "all-to-all", passes * rounds * 2, q


_CONTEXT = {"all_gather": _gathered, "ring": _ring, "ulysses": _exchanged}


def _pipeline(sizes: _Sizes) -> Iterator[_Term]:
    message = sizes.stream // sizes.config.layout.tensor
    yield "pipeline", "message", sizes.micro_batches * sizes.sends_forward, message
    yield "pipeline", "message", sizes.micro_batches * sizes.sends_back, message
    if sizes.config.model.tie_embeddings and (sizes.first or sizes.last):
        tied = _shard_elements(dict(_parameters(sizes))["embed.weight"], sizes)
        halves = sizes.config.optimizer.master == "split"
        yield "pipeline", "all-reduce", 1, tied * (sizes.compute if halves else sizes.master)


def _fsdp(sizes: _Sizes) -> Iterator[_Term]:
    """Weights are gathered once a step, gradients reduced once, block by block. Under ZeRO-3
    every micro-batch does both, and a block's weights are gathered in forward and in backward.
    """
    layout = sizes.config.layout
    ranks = layout.data_shard * layout.context
    for name, shapes in _wrapped(sizes):
        elements = sum(_shard_elements(shape, sizes) for shape in shapes)
        gathers = sizes.reductions * (2 if sizes.zero3 and name.startswith("layers") else 1)
        if ranks > 1:
            yield "data_shard", "all-gather", gathers, elements * ranks * sizes.compute
            yield "data_shard", "reduce-scatter", sizes.reductions, elements * ranks * sizes.master
        if layout.data_replicate > 1:
            yield "data_replicate", "all-reduce", sizes.reductions, elements * sizes.master


def _wrapped(sizes: _Sizes) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """What FSDP gathers together: each block, the embedding, the head; a tied weight is in one
    with the head's norm.
    """
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in _parameters(sizes):
        module, _ = name.rsplit(".", 1)
        together = sizes.last and sizes.config.model.tie_embeddings and module == "head"
        groups.setdefault("embed" if together else module, []).append(shape)
    yield from groups.items()


def _parameters(sizes: _Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape on one tensor rank of every parameter this pipeline rank holds."""
    model = sizes.config.model
    d, K, rows = model.hidden, model.head_dim, vocab_rows(model)
    block = {
        "attn_norm": (d,),
        "wq": (model.heads * K, d),
        "wkv": (model.kv_heads * 2 * K, d),
        "wo": (d, model.heads * K),
        "ffn_norm": (d,),
        "w13": (model.ffn, 2, d),
        "w2": (d, model.ffn),
    }
    shapes = {f"layers.{i}.{n}": s for r in sizes.stages for i in r for n, s in block.items()}
    if sizes.first or (sizes.last and model.tie_embeddings):
        shapes["embed.weight"] = (rows, d)
    if sizes.last:
        shapes["head.norm"] = (d,)
    if sizes.last and not model.tie_embeddings:
        shapes["head.weight"] = (rows, d)
    for name, shape in shapes.items():
        yield name, _cut(name, shape, sizes)


def _cut(name: str, shape: tuple[int, ...], sizes: _Sizes) -> tuple[int, ...]:
    tensor = sizes.config.layout.tensor
    dim = placement(name, kv_heads=sizes.config.model.kv_heads, tensor=tensor).shard_dim
    return tuple(size // tensor if i == dim else size for i, size in enumerate(shape))


def _replicated(name: str, sizes: _Sizes) -> bool:
    model, tensor = sizes.config.model, sizes.config.layout.tensor
    return placement(name, kv_heads=model.kv_heads, tensor=tensor).shard_dim is None


def _shard_elements(shape: tuple[int, ...], sizes: _Sizes) -> int:
    """Of one rank's part under FSDP, which cuts dimension 0 and pads it."""
    ranks = sizes.config.layout.data_shard * sizes.config.layout.context
    return ceil(shape[0] / ranks) * prod(shape[1:])


def _kv_features(sizes: _Sizes) -> int:
    """Of keys, or of values, on one tensor rank."""
    model = sizes.config.model
    return max(1, model.kv_heads // sizes.config.layout.tensor) * model.head_dim
