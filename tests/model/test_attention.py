"""Every path of attention computes the definition, and documents do not see each other."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megallama.model import attention
from megallama.model.attention import attend, plan_attention, reference_attention
from tests.model.small import borders_of, plan_of, positions_of, small_config, small_model

documents = st.lists(st.integers(1, 9), min_size=1, max_size=6)
heads = st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1), (6, 3)])

lengths_of_each_path = pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([24], id="one-row"),
        pytest.param([8, 8, 8], id="rows"),
        pytest.param([1, 1, 1], id="rows-of-one-token"),
        pytest.param([5, 1, 12, 6], id="documents"),
        pytest.param([1, 23], id="first-document-of-one-token"),
    ],
)


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """One token and one head at a time."""
    (T, Hq, K), Hkv = q.shape, k.shape[1]
    start_of = [
        start for start, n in zip(borders_of(lengths), lengths, strict=False) for _ in range(n)
    ]
    rows = []
    for t in range(T):
        for h in range(Hq):
            shared = h // (Hq // Hkv)
            seen = range(start_of[t], t + 1)
            scores = torch.stack([q[t, h] @ k[s, shared] / math.sqrt(K) for s in seen])
            exponentials = (scores - scores.max()).exp()
            weights = exponentials / exponentials.sum()
            rows.append(sum(w * v[s, shared] for w, s in zip(weights, seen, strict=True)))
    return torch.stack(rows).view(T, Hq, K)


def random_qkv(
    T: int, Hq: int, Hkv: int, K: int = 8, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T * 100 + Hq * 10 + Hkv)
    shapes = [(T, Hq, K), (T, Hkv, K), (T, Hkv, K)]
    drawn = [2 * torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def gradients(out: Tensor, qkv: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out)
    return list(torch.autograd.grad((out * weight).sum(), qkv))


@given(lengths=documents, heads=heads)
@settings(max_examples=15)
def test_the_reference_is_the_definition(lengths: list[int], heads: tuple[int, int]):
    qkv = random_qkv(sum(lengths), *heads)
    with torch.no_grad():
        found = reference_attention(*qkv, borders_of(lengths))
        torch.testing.assert_close(found, naive(*qkv, lengths), rtol=1e-12, atol=1e-12)


@given(lengths=documents, heads=heads)
@settings(max_examples=60)
def test_any_documents_equal_the_reference(lengths: list[int], heads: tuple[int, int]):
    qkv = random_qkv(sum(lengths), *heads)
    out = attend(*qkv, plan_of(small_config(), lengths, torch.float64))
    expected = reference_attention(*qkv, borders_of(lengths))
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    for found, wanted in zip(gradients(out, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@lengths_of_each_path
def test_each_path_and_its_gradients_equal_the_loop(lengths: list[int]):
    qkv = random_qkv(sum(lengths), 4, 2)
    out = attend(*qkv, plan_of(small_config(), lengths, torch.float64))
    expected = naive(*qkv, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(gradients(out, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_the_plan_takes_the_cheapest_path():
    config = small_config()
    assert plan_of(config, [8, 8], torch.float32).dense_rows == 2
    assert plan_of(config, [16], torch.float32).dense_rows == 1
    packed = plan_of(config, [7, 9], torch.float32)
    assert packed.dense_rows is None
    assert packed.segments == (((0, 7), (0, 7)), ((7, 16), (7, 16)))
    assert packed.block_mask is None, "FlexAttention has no backward on CPU"


@pytest.mark.parametrize(
    ("activations", "table"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_table_is_at_least_float32(activations: torch.dtype, table: torch.dtype):
    plan = plan_of(small_config(), [3, 4], activations)
    assert plan.cos.dtype == plan.sin.dtype == table


def whole_mask(lengths: list[int]) -> BlockMask:
    everything = [range(sum(lengths))]
    return attention.block_mask(borders_of(lengths), everything, everything, torch.device("cpu"))


@given(lengths=documents)
@settings(max_examples=25)
def test_the_mask_for_flex_attention_is_the_definition(lengths: list[int]):
    T = sum(lengths)
    mask = whole_mask(lengths)
    document = [d for d, length in enumerate(lengths) for _ in range(length)]
    zero = torch.tensor(0)
    for i in range(T):
        for j in range(T):
            visible = mask.mask_mod(zero, zero, torch.tensor(i), torch.tensor(j))
            assert bool(visible) == (document[i] == document[j] and j <= i)


several_blocks = pytest.mark.parametrize(
    "lengths", [[100, 28], [1, 127, 128, 44], [300], [129, 1, 130], [64, 64, 64, 65]], ids=str
)


@several_blocks
def test_flex_attention_skips_no_block_that_is_needed_and_computes_none_that_is_not(
    lengths: list[int],
):
    T = sum(lengths)
    mask = whole_mask(lengths)
    size, _ = mask.BLOCK_SIZE
    document = torch.tensor([d for d, length in enumerate(lengths) for _ in range(length)])
    visible = (document[:, None] == document[None]).tril()
    padded = torch.nn.functional.pad(visible, (0, -T % size, 0, -T % size))
    blocks = padded.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    needed = blocks.any(1).any(-1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), needed)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@several_blocks
def test_flex_path_equals_the_reference_in_eager_mode(lengths: list[int]):
    """The GPU's path through an uncompiled flex_attention, over more than one block."""
    q, k, v = (x.detach() for x in random_qkv(sum(lengths), 4, 2, 16, dtype=torch.float32))
    mask = whole_mask(lengths)
    with mock.patch.object(attention, "_compiled_flex", lambda: flex_attention):
        out = attention.flex(q, k, v, mask)
    expected = reference_attention(q.double(), k.double(), v.double(), borders_of(lengths))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("lengths", [[100, 28], [1, 127, 128, 44, 300], [512, 512]], ids=str)
def test_on_a_gpu_equals_the_reference(
    lengths: list[int], heads: tuple[int, int], dtype: torch.dtype, bar: float
):
    qkv = random_qkv(sum(lengths), *heads, K=64, device="cuda", dtype=dtype)
    plan = plan_attention(
        small_config(), positions_of(lengths).cuda(), borders_of(lengths), dtype=dtype
    )
    assert (plan.block_mask is None) == (len(set(lengths)) == 1)
    out = attend(*qkv, plan)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference_attention(*wide, borders_of(lengths))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() < bar * expected.norm()
    for found, wanted in zip(gradients(out, qkv), gradients(expected, wide), strict=True):
        assert (found.double() - wanted).norm() < 2 * bar * wanted.norm()


@given(lengths=documents, kv_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=15)
def test_logits_of_packed_documents_equal_each_document_alone(lengths: list[int], kv_heads: int):
    config = small_config(kv_heads=kv_heads)
    model = small_model(config, torch.float64)
    T = sum(lengths)
    tokens = torch.randint(config.vocab, (T,), generator=torch.Generator().manual_seed(T))
    with torch.no_grad():
        together = model(tokens, plan_of(config, lengths, torch.float64))
        alone = [
            model(document, plan_of(config, [len(document)], torch.float64))
            for document in tokens.split(lengths)
        ]
    assert together.shape == (T, config.vocab)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-11, atol=1e-11)


def test_a_token_changes_nothing_before_it_nor_in_other_documents():
    config = small_config()
    model, lengths = small_model(config, torch.float64), [6, 10, 5]
    plan = plan_of(config, lengths, torch.float64)
    tokens = torch.arange(21)
    changed = tokens.clone()
    changed[9] = 150  # the fourth token of the second document
    with torch.no_grad():
        moved = (model(tokens, plan) - model(changed, plan)).abs().amax(-1) > 1e-9
    assert moved.nonzero().flatten().tolist() == list(range(9, 16))
