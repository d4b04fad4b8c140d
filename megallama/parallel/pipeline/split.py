"""Which layers each pipeline stage holds. Standard library only."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

EMBEDDING_COST = 0.02
"""Time of the embedding, in units of a block's: it multiplies nothing, but is not free.

Forward and backward move some 14 bytes a feature (bf16 rows read, written, and added to fp32
gradients); where a device does 150 FLOPs in the time of a byte (400 TFLOP/s, 2.7 TB/s), that is the
time of 2,100·hidden FLOPs. A Llama 3 block has about 80·hidden²: 1.3 % at 2048, 0.6 % at 4096. The
exact number hardly matters: it decides who has a layer fewer where layers do not divide.
"""


def split_layers(
    layers: int, stages: int, *, first_cost: float = 0.0, last_cost: float = 0.0
) -> list[range]:
    """Consecutive layers for each stage, so that the costliest stage is as cheap as can be.

    Among such splits the sum of squared costs is least; among those, later stages hold more, since
    earlier ranks hold more micro-batches in flight. Every stage has a layer. Only where there are
    fewer layers than stages, one that has the embedding or the head does without: Llama 3 405B has
    126 layers for 128 stages (arXiv 2407.21783, section 3.3.2).

    Args:
        layers: of the model, of cost 1 each.
        stages: on all pipeline ranks.
        first_cost: of the first stage's embedding, in layers.
        last_cost: of the last stage's head, in layers; `end_costs` has both.

    Raises:
        ValueError: there are more stages than layers.

    """
    costs = [0.0] * stages
    costs[0] += first_cost
    costs[-1] += last_cost
    sizes = [0 if cost > 0 and layers < stages else 1 for cost in costs]
    if sum(sizes) > layers:
        raise ValueError(f"{stages} pipeline stages for {layers} layers")
    # A layer at a time to the cheapest stage: then none can pass one on and end up cheaper, which
    # for the sum of squares, and for the largest cost with it, is the optimum.
    for _ in range(layers - sum(sizes)):
        least = min(cost + size for cost, size in zip(costs, sizes, strict=True))
        cheapest = [s for s in range(stages) if costs[s] + sizes[s] == least]
        sizes[cheapest[-1]] += 1
    return _ranges(sizes)


def given_split(sizes: Sequence[int], layers: int) -> list[range]:
    """Consecutive layers for stages whose sizes the user gives.

    Args:
        sizes: layers of each stage, in order; only the first and the last may have none.
        layers: of the model.

    Raises:
        ValueError: they do not sum to `layers`, or a stage has nothing to compute.

    """
    if sum(sizes) != layers:
        raise ValueError(
            f"stages of {list(sizes)} layers hold {sum(sizes)}, the model has {layers}"
        )
    if min(sizes) < 0 or 0 in sizes[1:-1]:
        raise ValueError(f"stages of {list(sizes)} layers: only the first and the last may have 0")
    return _ranges(sizes)


def end_costs(
    *, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int, seq_len: int
) -> tuple[float, float]:
    """Cost of the embedding and of the head, in units of a transformer block's time.

    FLOPs a token: 2 a weight, in the block 2·seq_len·heads·head_dim more for causal attention (half
    of seq_len keys, for scores and for values). Backward takes twice both, which cancels. Norms,
    rotary embedding and the loss are left out.

    Args:
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: features a head.
        ffn: features of the SwiGLU hidden layer.
        vocab: rows of the head.
        seq_len: tokens of a sequence.

    """
    query, key = heads * head_dim, kv_heads * head_dim
    block = 2 * hidden * (2 * query + 2 * key + 3 * ffn) + 2 * seq_len * query
    return EMBEDDING_COST, 2 * hidden * vocab / block


def _ranges(sizes: Sequence[int]) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]
