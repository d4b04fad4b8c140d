"""Every context method computes what one process does, and so do the parts it is made of."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megallama_kernels.language import at_least_float32
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

from megallama.config.schema import LayoutConfig, ModelConfig
from megallama.mesh import Axis, ProcessGroupManager, build_process_groups
from megallama.model import attention
from megallama.model.attention import (
    attend,
    attend_in_part,
    block_mask,
    plan_attention,
    reference_attention,
    stream_index,
    visible,
)
from megallama.model.llama import Llama
from megallama.model.seams import IGNORED_LABEL, Seams
from megallama.parallel.context import ring
from megallama.parallel.context.compose import Stream, context_seams, plan_for_rank
from megallama.parallel.context.split import SPLITS
from megallama.parallel.placements import placement
from megallama.parallel.tensor import shard_over_tensor, tensor_seams
from tests.model.small import borders_of, plan_of, positions_of, small_config, small_model
from tests.ranks import ranks

close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
CPU = torch.device("cpu")
T = 48
STREAMS = {
    "documents that chunks cut": [13, 1, 20, 3, 11],
    "one document": [48],
    "rows without document mask": [24, 24],
    "documents shorter than chunks": [2, 3, 1, 4, 2, 5, 1, 6, 3, 2, 4, 1, 5, 2, 3, 4],
}
BALANCES = {
    "all_gather": ["head_tail", "per_document"],
    "ring": ["head_tail", "per_document"],
    "ulysses": ["head_tail"],
}
every_method = pytest.mark.parametrize("method", BALANCES)


@dataclass(frozen=True)
class Seen:
    """Of one process, or this rank's share of the loss and everyone's gradients."""

    loss: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its weights, and what it is given."""

    config: ModelConfig
    lengths: list[int]
    tokens: Tensor
    labels: Tensor
    scale: Tensor

    def in_one_process(self, dtype: torch.dtype) -> Seen:
        model = small_model(self.config, torch.float64).to(dtype)
        plan = plan_of(self.config, self.lengths, dtype)
        loss = model(self.tokens, plan, self.labels, self.scale)
        loss.backward()
        return Seen(
            loss.detach(), {n: at_least_float32(p.grad) for n, p in model.named_parameters()}
        )

    def over_ranks(
        self, layout: LayoutConfig, groups: ProcessGroupManager, dtype: torch.dtype
    ) -> Seen:
        """What this rank sees of the tokens it computes."""
        model = self._model_over(groups, layout.context_method).to(dtype)
        positions, borders = positions_of(self.lengths), borders_of(self.lengths)
        stream = Stream(self.config, positions, borders, dtype)
        held, plan = plan_for_rank(stream, layout, groups.context)
        assert held is not None
        assert len(held) == T // groups.context.size
        loss = model(self.tokens[held], plan, self.labels[held], self.scale)
        loss.backward()
        gradients = {n: _whole_gradient(p, groups) for n, p in model.named_parameters()}
        return Seen(loss.detach(), gradients)

    def _model_over(self, groups: ProcessGroupManager, method: str) -> Llama:
        """With the seams, and the weights of the model in one process."""
        config, tensor = self.config, groups.tensor
        split = tensor_seams(tensor, config.kv_heads) if tensor.size > 1 else {}
        seams: dict[str, Any] = split | context_seams(groups, method)
        with torch.device("meta"):
            model = Llama(config, Seams(**seams)).double()
        if tensor.size > 1:
            shard_over_tensor(model, groups, config.kv_heads)
        model.to_empty(device="cpu")
        weights = dict(small_model(config, torch.float64).named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                dim = placement(name, kv_heads=config.kv_heads, tensor=tensor.size).shard_dim
                whole = weights[name]
                cut = whole if dim is None else whole.chunk(tensor.size, dim)[tensor.rank]
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.copy_(cut)
        return model


def _whole_loss(seen: Seen, groups: ProcessGroupManager) -> Tensor:
    loss = seen.loss.clone()
    dist.all_reduce(loss, group=groups.context.group)
    return loss


def _whole_gradient(parameter: Tensor, groups: ProcessGroupManager) -> Tensor:
    """Summed over context ranks, as FSDP does it, and put together from tensor ranks."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor):
        gradient = gradient.full_tensor()
    gradient = at_least_float32(gradient).clone()
    dist.all_reduce(gradient, group=groups.context.group)
    return gradient


def case(lengths: list[int], **changes: Any) -> Case:
    """The same on all ranks: `@ranks` seeds them alike."""
    config = small_config(**({"heads": 8, "kv_heads": 4} | changes))
    tokens, labels = torch.randint(config.vocab, (2, T))
    labels[5:8] = IGNORED_LABEL
    return Case(config, lengths, tokens, labels, torch.tensor(0.1))


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative error."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def check_exact(
    this: Case, layout: LayoutConfig, groups: ProcessGroupManager, wanted: Seen
) -> None:
    found = this.over_ranks(layout, groups, torch.float64)
    what = f"{layout.context_balance}, {this.config.kv_heads} kv_heads, {this.lengths}"
    close(_whole_loss(found, groups), wanted.loss, msg=lambda text: f"{what}: {text}")
    for name, gradient in found.gradients.items():
        error = off(gradient, wanted.gradients[name])
        assert error < 1e-11, f"{what}: {name} is off by {error:.1e}"


def check_rounding(
    this: Case, layout: LayoutConfig, groups: ProcessGroupManager, dtype: torch.dtype
) -> None:
    """Nearly as close to float64 as one process in that dtype."""
    exact, alone = this.in_one_process(torch.float64), this.in_one_process(dtype)
    found = this.over_ranks(layout, groups, dtype)
    least = torch.finfo(dtype).eps
    drift = max(least, off(alone.loss, exact.loss))
    assert off(_whole_loss(found, groups), exact.loss) < 3 * drift
    for name, gradient in found.gradients.items():
        drift = max(least, off(alone.gradients[name], exact.gradients[name]))
        assert off(gradient, exact.gradients[name]) < 3 * drift, name


def check_method(method: str, cases: Sequence[Case], *, tensor: int = 1) -> None:
    context = dist.get_world_size() // tensor
    layout = LayoutConfig(tensor=tensor, context=context, context_method=method, data_shard=1)
    groups = build_process_groups(layout, "cpu")
    for this in cases:
        wanted = this.in_one_process(torch.float64)
        for balance in BALANCES[method]:
            balanced = layout.model_copy(update={"context_balance": balance})
            check_exact(this, balanced, groups, wanted)


@every_method
@ranks(2)
def test_the_model_over_two_ranks(method: str):
    check_method(method, [case(lengths) for lengths in STREAMS.values()])


@every_method
@ranks(4)
def test_the_model_over_four_ranks(method: str):
    """With as many key/value heads as ranks, and with fewer."""
    cases = [case(lengths) for lengths in STREAMS.values()]
    few = [case(STREAMS["documents that chunks cut"], kv_heads=n) for n in (1, 2)]
    check_method(method, [*cases, *few])


@every_method
@ranks(4)
def test_the_model_over_two_tensor_by_two_context_ranks(method: str):
    cases = [case(lengths) for lengths in STREAMS.values()]
    few = [case(STREAMS["documents that chunks cut"], kv_heads=n) for n in (1, 2)]
    check_method(method, [*cases, *few], tensor=2)


@every_method
@ranks(2)
def test_rounds_as_one_process_does(method: str):
    layout = LayoutConfig(context=2, context_method=method, data_shard=1)
    groups = build_process_groups(layout, "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        check_rounding(case(STREAMS["documents that chunks cut"]), layout, groups, dtype)


@ranks(4)
def test_while_it_attends_a_ring_holds_two_blocks_of_other_ranks_at_most():
    """And in backward a gradient that comes round."""
    received: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    start, part = ring.start_pass, ring.attend_in_part

    def start_pass(block: Tensor, group: dist.ProcessGroup) -> Any:
        passing = start(block, group)
        received.append(weakref.ref(passing.arriving))
        return passing

    def attend_and_count(*args: Any) -> Any:
        held.append(sum(block() is not None for block in received))
        return part(*args)

    size = dist.get_world_size()
    layout = LayoutConfig(context=size, context_method="ring", data_shard=1)
    stream = Stream(small_config(), positions_of([T]), borders_of([T]), torch.float64)
    mine, plan = plan_for_rank(stream, layout, Axis(size, dist.get_rank(), dist.group.WORLD))
    q, k, v = (x[mine] for x in random_qkv(T, 4, 2))
    with (
        mock.patch.object(ring, "start_pass", start_pass),
        mock.patch.object(ring, "attend_in_part", attend_and_count),
    ):
        out = ring.attend_around(dist.group.WORLD, q, k, v, plan)
        assert len(held) == size
        assert max(held) <= 2
        held.clear()
        out.sum().backward()
        assert len(held) == size
        assert max(held) <= 3
    assert not any(block() is not None for block in received), "a block outlived its use"


@ranks(1)
def test_one_context_rank_computes_the_plain_model():
    groups = build_process_groups(LayoutConfig(data_shard=1), "cpu")
    assert context_seams(groups, "ring") == {}
    stream = Stream(small_config(), positions_of([3, 5]), borders_of([3, 5]), torch.float64)
    held, plan = plan_for_rank(stream, LayoutConfig(), groups.context)
    assert held is None
    assert plan.segments == plan_of(small_config(), [3, 5], torch.float64).segments


lengths_of_documents = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@st.composite
def some_ranges(draw: st.DrawFn, total: int) -> list[range]:
    """Ascending, none next to another."""
    chosen = draw(st.lists(st.booleans(), min_size=total, max_size=total).filter(any))
    edges = [i for i in range(total + 1) if [*chosen, False][i] != [False, *chosen][i]]
    return [range(*edge) for edge in zip(edges[::2], edges[1::2], strict=True)]


def random_qkv(total: int, heads: int, kv_heads: int, K: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = [(total, heads, K), (total, kv_heads, K), (total, kv_heads, K)]
    drawn = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return [(2 * x).requires_grad_() for x in drawn]


def sees(lengths: Sequence[int], query: int, key: int) -> bool:
    document = [d for d, length in enumerate(lengths) for _ in range(length)]
    return document[query] == document[key] and key <= query


@given(data=st.data(), lengths=lengths_of_documents)
@settings(max_examples=40)
def test_attend_for_some_queries_is_rows_of_the_whole(data: st.DataObject, lengths: list[int]):
    queries = data.draw(some_ranges(sum(lengths)))
    at_hand = stream_index(queries, CPU)
    config, borders, positions = small_config(), borders_of(lengths), positions_of(lengths)
    plan = plan_attention(config, positions, borders, dtype=torch.float64, queries=queries)
    whole = plan_attention(config, positions, borders, dtype=torch.float64)
    assert torch.equal(plan.positions, whole.positions[at_hand])
    assert torch.equal(plan.key_positions, whole.key_positions)
    assert torch.equal(plan.cos, whole.cos)
    assert torch.equal(plan.sin, whole.sin)
    q, k, v = random_qkv(sum(lengths), 4, 2)
    found = attend(q[at_hand], k, v, plan)
    wanted = reference_attention(q, k, v, borders)[at_hand]
    close(found, wanted)
    weight = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        close(one, other)


@st.composite
def parts_of_keys(draw: st.DrawFn, total: int) -> list[list[range]]:
    """Disjoint, together all keys."""
    owners = draw(st.lists(st.integers(0, 2), min_size=total, max_size=total))
    parts = [[range(i, i + 1) for i, o in enumerate(owners) if o == owner] for owner in range(3)]
    return [part for part in parts if part]


@given(
    data=st.data(), lengths=lengths_of_documents, heads=st.sampled_from([(4, 4), (4, 2), (2, 1)])
)
@settings(max_examples=40)
def test_parts_over_disjoint_keys_add_up_to_the_whole(
    data: st.DataObject, lengths: list[int], heads: tuple[int, int]
):
    total, borders = sum(lengths), borders_of(lengths)
    q, k, v = random_qkv(total, *heads)
    outs, log_sums = [], []
    for keys in data.draw(parts_of_keys(total)):
        at = stream_index(keys, CPU)
        out, log_sum = attend_in_part(q, k[at], v[at], visible(borders, [range(total)], keys, CPU))
        outs.append(out)
        log_sums.append(log_sum)
    shares = torch.stack(log_sums).softmax(0)
    found = (torch.stack(outs) * shares[..., None]).sum(0)
    wanted = reference_attention(q, k, v, borders)
    close(found, wanted)
    weight = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        close(one, other, rtol=1e-9, atol=1e-9)


@given(data=st.data(), lengths=lengths_of_documents)
@settings(max_examples=40)
def test_a_query_that_sees_nothing_of_a_part_gives_zero_and_minus_infinity(
    data: st.DataObject, lengths: list[int]
):
    total = sum(lengths)
    queries, keys = (data.draw(some_ranges(total)) for _ in range(2))
    q_at, k_at = stream_index(queries, CPU), stream_index(keys, CPU)
    q, k, v = (x.detach() for x in random_qkv(total, 4, 2))
    q, k, v = (x.requires_grad_() for x in (q[q_at], k[k_at], v[k_at]))
    out, log_sum = attend_in_part(q, k, v, visible(borders_of(lengths), queries, keys, CPU))
    table = [[sees(lengths, i, j) for j in k_at.tolist()] for i in q_at.tolist()]
    blind = ~torch.tensor(table).any(1)
    unseen = ~torch.tensor(table).any(0)
    assert out[blind].eq(0).all()
    assert log_sum[blind].eq(-torch.inf).all()
    assert log_sum[~blind].isfinite().all()
    of_log_sum = torch.where(blind[:, None], 0.0, torch.randn_like(log_sum))
    gradients = torch.autograd.grad((out, log_sum), (q, k, v), (torch.randn_like(out), of_log_sum))
    assert all(g.isfinite().all() for g in gradients)
    for gradient, without in zip(gradients, (blind, unseen, unseen), strict=True):
        assert gradient[without].eq(0).all()


@given(data=st.data(), lengths=lengths_of_documents)
@settings(max_examples=40)
def test_visible_and_the_mask_for_flex_attention_are_the_definition(
    data: st.DataObject, lengths: list[int]
):
    queries, keys = (data.draw(some_ranges(sum(lengths))) for _ in range(2))
    q_at, k_at = (stream_index(ranges, CPU).tolist() for ranges in (queries, keys))
    expected = torch.tensor([[sees(lengths, i, j) for j in k_at] for i in q_at])
    assert torch.equal(visible(borders_of(lengths), queries, keys, CPU), expected)
    mask = block_mask(borders_of(lengths), queries, keys, CPU)
    dense = create_mask(mask.mask_mod, None, None, len(q_at), len(k_at), device="cpu")
    assert torch.equal(dense[0, 0], expected)


several_blocks = pytest.mark.parametrize("split", ["head_tail", "per_document"])


@several_blocks
def test_the_mask_of_a_part_skips_no_block_that_is_needed_and_computes_none_that_is_not(split: str):
    borders = borders_of([700, 100, 224])
    spans = SPLITS[split](borders, 2)
    for queries in spans:
        for keys in [*spans, [range(1024)]]:
            mask = block_mask(borders, queries, keys, CPU)
            rows, columns = mask.BLOCK_SIZE
            seen = visible(borders, queries, keys, CPU)
            padded = torch.nn.functional.pad(
                seen, (0, -seen.shape[1] % columns, 0, -seen.shape[0] % rows)
            )
            blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
            assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(1).any(-1))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@several_blocks
def test_a_part_through_flex_attention_equals_the_plain_one(split: str):
    """The GPU's path through an uncompiled flex_attention."""
    lengths = [140, 20, 96]
    borders = borders_of(lengths)
    spans = SPLITS[split](borders, 2)
    whole = [x.detach().float() for x in random_qkv(256, 4, 2, 16)]
    for queries in spans:
        for keys in spans:
            q_at, k_at = stream_index(queries, CPU), stream_index(keys, CPU)
            q, k, v = whole[0][q_at], whole[1][k_at], whole[2][k_at]
            with mock.patch.object(attention, "_compiled_flex", lambda: flex_attention):
                found = attend_in_part(q, k, v, block_mask(borders, queries, keys, CPU))
            wanted = attend_in_part(q, k, v, visible(borders, queries, keys, CPU))
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
