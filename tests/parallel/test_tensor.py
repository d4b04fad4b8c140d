"""Each tensor-parallel seam against the single-device seam, in float64, forward and backward."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megallama_kernels.linear_cross_entropy import PLAIN
from torch import Tensor

from megallama.config.schema import LayoutConfig, ModelConfig
from megallama.mesh import Axis, build_process_groups
from megallama.model.init import initialize
from megallama.model.llama import Llama
from megallama.model.seams import IGNORED_LABEL, Seams, project
from megallama.parallel import tensor
from megallama.parallel.materialize import materialize
from megallama.parallel.overlap import overlap_seams
from megallama.parallel.placements import placement
from tests.model.small import plan_of, small_config
from tests.ranks import ranks

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
T, D = 16, 12


def axis() -> Axis:
    return Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def mine(x: Tensor, dim: int = 0) -> Tensor:
    """This rank's piece, as a leaf."""
    piece = x.detach().chunk(dist.get_world_size(), dim)[dist.get_rank()]
    return piece.contiguous().requires_grad_()


def draw(*shape: int) -> Tensor:
    """The same on all ranks: `@ranks` seeds them alike."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def check_enter() -> None:
    group = dist.group.WORLD
    x, first, second = draw(T, D), draw(8, D), draw(24, D)
    expected = project(x, first, second)
    upstream = [torch.randn_like(out) for out in expected]
    torch.autograd.backward(expected, upstream)

    local_x, local_first, local_second = mine(x), mine(first), mine(second)
    out = tensor.enter(group, local_x, local_first, local_second)
    for found, wanted, features in zip(out, expected, (8, 24), strict=True):
        assert found.shape == (T, features // dist.get_world_size())
        close(found, mine(wanted, 1))
    torch.autograd.backward(out, [mine(g, 1).detach() for g in upstream])
    close(local_x.grad, mine(x.grad).detach())
    close(local_first.grad, mine(first.grad).detach())
    close(local_second.grad, mine(second.grad).detach())


def check_enter_with_an_unused_projection() -> None:
    """Backward then gets no gradient for it."""
    x, used, unused = draw(T, D), draw(8, D), draw(8, D)
    project(x, used)[0].square().sum().backward()
    local_x, local_used = mine(x), mine(used)
    out, _ = tensor.enter(dist.group.WORLD, local_x, local_used, mine(unused))
    out.square().sum().backward()
    close(local_x.grad, mine(x.grad).detach())
    close(local_used.grad, mine(used.grad).detach())


def check_leave() -> None:
    x, weight = draw(T, 8), draw(D, 8)
    expected = torch.nn.functional.linear(x, weight)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)

    local_x, local_weight = mine(x, 1), mine(weight, 1)
    out = tensor.leave(dist.group.WORLD, local_x, local_weight)
    close(out, mine(expected))
    out.backward(mine(upstream).detach())
    close(local_x.grad, mine(x.grad, 1).detach())
    close(local_weight.grad, mine(weight.grad, 1).detach())


def check_embed() -> None:
    weight = draw(32, D)
    tokens = torch.randint(32, (T,))
    tokens[:3] = torch.tensor([0, 31, 0])  # a repeated one, and both ends
    expected = torch.nn.functional.embedding(tokens, weight)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)

    local_weight = mine(weight)
    out = tensor.embed(axis(), tokens, local_weight)
    close(out, mine(expected))
    out.backward(mine(upstream).detach())
    close(local_weight.grad, mine(weight.grad).detach())


def check_loss(vocab: int, rows: int, ignored: str, size: float = 1.0) -> None:
    x, weight = draw(T, D), (size * draw(rows, D)).detach().requires_grad_()
    labels = torch.randint(vocab, (T,))
    labels[:2] = torch.tensor([0, vocab - 1])
    if ignored != "none":
        labels[slice(None) if ignored == "all" else slice(3, 9)] = IGNORED_LABEL
    scale = torch.tensor(0.1, dtype=torch.float64)
    logits = (x @ weight.t())[:, :vocab]
    expected = scale * F.cross_entropy(logits, labels, reduction="sum")
    (3 * expected).backward()

    local_x, local_weight = mine(x), mine(weight)
    loss = tensor.loss(axis(), local_x, local_weight, labels, scale, vocab, PLAIN)
    assert loss.dtype == torch.float64
    close(loss, expected)
    (3 * loss).backward()
    close(local_x.grad, mine(x.grad).detach(), atol=size * 1e-12)
    close(local_weight.grad, mine(weight.grad).detach())
    gathered = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, loss.detach())
    assert all(torch.equal(other, loss) for other in gathered), "ranks disagree on the loss"
    with torch.no_grad():
        close(tensor.loss(axis(), local_x, local_weight, labels, scale, vocab, PLAIN), expected)


def check_gathered_tokens_are_not_saved() -> None:
    size = dist.get_world_size()
    x, weight = mine(draw(T, D)), mine(draw(8, D))
    saved: list[Tensor] = []

    def note(tensor_: Tensor) -> Tensor:
        saved.append(tensor_)
        return tensor_

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor_: tensor_):
        (_out,) = tensor.enter(dist.group.WORLD, x, weight)
    assert {tuple(s.shape) for s in saved} == {(T // size, D), (8 // size, D)}
    assert {s.untyped_storage().data_ptr() for s in saved} == {
        x.untyped_storage().data_ptr(),
        weight.untyped_storage().data_ptr(),
    }, "what is saved must be the arguments themselves"


def check_model(changes: dict[str, Any], *, overlap: bool = False) -> None:
    """`local`, and all seams together: the loss and every gradient."""
    config = small_config(**({"heads": 8, "kv_heads": 4} | changes))
    lengths, size = [T // 2, T // 4, T // 4], dist.get_world_size()
    tokens, labels = torch.randint(config.vocab, (2, T))
    labels[4] = IGNORED_LABEL
    plan = plan_of(config, lengths, torch.float64)

    expected = Llama(config).double()
    initialize(expected, config, 5)
    scale = torch.tensor(0.1)
    wanted = expected(tokens, plan, labels, scale)
    wanted.backward()

    model = tensor_parallel(config, seed=5, overlap=overlap)
    for name, parameter in model.named_parameters():
        dim = placement(name, kv_heads=config.kv_heads, tensor=size).shard_dim
        whole = dict(expected.named_parameters())[name]
        held = whole if dim is None else whole.chunk(size, dim)[dist.get_rank()]
        assert torch.equal(parameter.to_local(), held), name
    loss = model(tokens, plan, labels, scale)
    close(loss, wanted)
    loss.backward()
    for (name, parameter), whole in zip(
        model.named_parameters(), expected.parameters(), strict=True
    ):
        grad = parameter.grad.full_tensor()
        off = (grad - whole.grad).norm() / whole.grad.norm()
        assert off < 1e-12, f"{name}: {off:.1e}"


def tensor_parallel(config: ModelConfig, seed: int, *, overlap: bool = False) -> Llama:
    groups = build_process_groups(LayoutConfig(tensor=dist.get_world_size(), data_shard=1), "cpu")
    overlapped = overlap_seams(groups.tensor.group) if overlap else {}
    seams = Seams(**tensor.tensor_seams(groups.tensor, config.kv_heads) | overlapped)
    with torch.device("meta"):
        model = Llama(config, seams).double()
    tensor.shard_over_tensor(model, groups, config.kv_heads)
    materialize(model, config, groups, seed, torch.device("cpu"))
    return model


def check_seams() -> None:
    check_enter()
    check_enter_with_an_unused_projection()
    check_leave()
    check_embed()
    check_gathered_tokens_are_not_saved()


@ranks(2)
def test_seams_over_two_ranks():
    check_seams()


@ranks(4)
def test_seams_over_four_ranks():
    check_seams()


vocabularies = pytest.mark.parametrize(
    ("vocab", "rows"),
    [
        pytest.param(32, 32, id="no-padding"),
        pytest.param(27, 32, id="padding"),
        pytest.param(15, 32, id="ranks-of-padding-alone"),
        pytest.param(1, 32, id="one-token"),
    ],
)


@vocabularies
@ranks(2)
def test_loss_over_two_ranks(vocab: int, rows: int):
    for ignored in ("none", "some", "all"):
        check_loss(vocab, rows, ignored)


@vocabularies
@ranks(4)
def test_loss_over_four_ranks(vocab: int, rows: int):
    for ignored in ("none", "some", "all"):
        check_loss(vocab, rows, ignored)
    check_loss(vocab, rows, "some", size=300.0)  # exponentials would overflow


models_over_two = pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 1}, {"tie_embeddings": True, "kv_heads": 2}, {"vocab": 100}],
    ids=str,
)
models_over_four = pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 2}, {"kv_heads": 1, "tie_embeddings": True}, {"kv_heads": 8, "vocab": 128}],
    ids=str,
)


@models_over_two
@ranks(2)
def test_the_model_over_two_ranks(changes: dict[str, Any]):
    check_model(changes)


@models_over_four
@ranks(4)
def test_the_model_over_four_ranks(changes: dict[str, Any]):
    check_model(changes)


@pytest.mark.parametrize(
    ("kv_heads", "size", "heads"), [(1, 2, [0, 0]), (2, 4, [0, 0, 1, 1]), (2, 8, [0] * 4 + [1] * 4)]
)
def test_ranks_share_the_head_their_queries_attend_to(kv_heads: int, size: int, heads: list[int]):
    layout = placement("layers.0.wkv", kv_heads=kv_heads, tensor=size)
    places = [SimpleNamespace(rank=rank) for rank in range(size)]
    assert [tensor.kv_head_of(place, layout) for place in places] == heads


@ranks(2)
def test_overlapped_products_are_the_same_model():
    """On CPU with torch's own unfused fallbacks; `tests/parallel/test_overlap.py` on GPUs."""
    from torch.distributed import _symmetric_memory as symmetric

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", symmetric._fused_all_gather_matmul_fallback, "CPU")
    library.impl(
        "fused_matmul_reduce_scatter", symmetric._fused_matmul_reduce_scatter_fallback, "CPU"
    )
    check_model({}, overlap=True)
