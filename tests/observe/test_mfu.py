import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megallama.config.schema import ModelConfig
from megallama.observe.mfu import attended_pairs, model_flops, palm_flops, peak_flops

LLAMA3_8B = ModelConfig(
    hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256
)
TINY = ModelConfig(hidden=24, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=40, vocab=50)


def tiny_llama_flops(model: ModelConfig, tokens: int) -> int:
    """FLOPs torch counts in forward and backward of a Llama with full, unmasked attention."""
    d, hd = model.hidden, model.head_dim
    sizes = {
        "q": (model.heads * hd, d),
        "k": (model.kv_heads * hd, d),
        "v": (model.kv_heads * hd, d),
        "o": (d, model.heads * hd),
        "gate": (model.ffn, d),
        "up": (model.ffn, d),
        "down": (d, model.ffn),
    }
    embedding, head = (torch.randn(model.vocab, d, requires_grad=True) for _ in range(2))
    blocks = [
        {name: torch.randn(size, requires_grad=True) for name, size in sizes.items()}
        for _ in range(model.layers)
    ]
    with FlopCounterMode(display=False) as counter:
        x = F.embedding(torch.arange(tokens) % model.vocab, embedding)
        for w in blocks:
            h = F.rms_norm(x, (d,))
            q, k, v = (F.linear(h, w[n]).view(tokens, -1, hd).transpose(0, 1) for n in "qkv")
            repeats = model.heads // model.kv_heads
            k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
            weights = (q @ k.transpose(1, 2) / math.sqrt(hd)).softmax(-1)
            x = x + F.linear((weights @ v).transpose(0, 1).reshape(tokens, -1), w["o"])
            h = F.rms_norm(x, (d,))
            x = x + F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])
        F.linear(x, head).logsumexp(-1).sum().backward()
    return counter.get_total_flops()


def pairs_by_hand(lengths: list[int]) -> int:
    return sum(1 for length in lengths for query in range(length) for key in range(query + 1))


def test_palm_count_is_what_torch_counts_without_a_mask():
    tokens = 56
    assert palm_flops(TINY, tokens, seq_len=tokens) == tiny_llama_flops(TINY, tokens)


def test_causal_count_is_what_torch_counts_with_attention_scaled_to_the_attended_pairs():
    tokens, lengths = 56, [1, 30, 25]
    attention = tiny_llama_flops(TINY, tokens) - palm_flops(TINY, tokens, seq_len=0)
    attended = attention * pairs_by_hand(lengths) / tokens**2
    expected = palm_flops(TINY, tokens, seq_len=0) + attended
    assert model_flops(TINY, tokens, attended_pairs([0, 1, 31, 56])) == pytest.approx(
        expected, rel=1e-12
    )


def test_llama3_8b_at_8192_tokens():
    pairs = attended_pairs([0, 8192])
    assert round(model_flops(LLAMA3_8B, 8192, pairs) / 8192 / 1e9, 2) == 51.47
    assert round(palm_flops(LLAMA3_8B, 8192, 8192) / 8192 / 1e9, 2) == 57.91


def test_tying_the_head_changes_nothing():
    tied = LLAMA3_8B.model_copy(update={"tie_embeddings": True})
    assert model_flops(tied, 10, 55) == model_flops(LLAMA3_8B, 10, 55)


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 7], [2, 2, 2]])
def test_attended_pairs_are_the_pairs_one_can_count(lengths):
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert attended_pairs(bounds) == pairs_by_hand(lengths)
    padded = [*bounds, bounds[-1], bounds[-1]]
    assert attended_pairs(torch.tensor(padded, dtype=torch.int32)) == pairs_by_hand(lengths)


def test_attended_pairs_of_a_long_document_do_not_overflow():
    bounds = torch.tensor([0, 131072], dtype=torch.int32)
    assert attended_pairs(bounds) == 131072 * 131073 // 2 > 2**31


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp8", 1671),
        ("NVIDIA H200", "fp8", 1979),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB300", "bf16", 2450),
        ("AMD Instinct MI300X", "bf16", 1307),
    ],
)
def test_peaks(device, precision, tflops):
    assert peak_flops(device, precision) == tflops * 1e12


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("NVIDIA H100", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("nvidia h200", "bf16"),
        ("", "bf16"),
        ("NVIDIA H200", "fp32"),
        ("NVIDIA H200", "fp64"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),
    ],
)
def test_no_peak_is_guessed(device, precision):
    assert peak_flops(device, precision) is None
