"""Floating point operations of a training step, and what devices can do at most.

MFU is a ratio of two conventions, so both ends are spelled out here. The numerator counts what the
model needs (forward and backward, never recomputation); published numbers differ in how they count
attention, by 12 % for Llama 3 8B at 8192 tokens, so both common counts are given.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from megallama.config.schema import ModelConfig

A100 = {"bf16": 312.0}
HOPPER_SXM = {"bf16": 989.0, "fp8": 1979.0}
HOPPER_PCIE = {"bf16": 756.0, "fp8": 1513.0}
HOPPER_NVL = {"bf16": 835.0, "fp8": 1671.0}
B200 = {"bf16": 2250.0, "fp8": 4500.0}
GB200 = {"bf16": 2450.0, "fp8": 4900.0}
MI300 = {"bf16": 1307.0, "fp8": 2615.0}

# Data sheets, without sparsity. No fp32: whether it means TF32 depends on a switch set elsewhere.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA A800-SXM4-80GB": A100,
    "NVIDIA H100 80GB HBM3": HOPPER_SXM,
    "NVIDIA H100 PCIe": HOPPER_PCIE,
    "NVIDIA H100 NVL": HOPPER_NVL,
    "NVIDIA H800": HOPPER_SXM,
    "NVIDIA H200": HOPPER_SXM,
    "NVIDIA H200 NVL": HOPPER_NVL,
    "NVIDIA GH200 120GB": HOPPER_SXM,
    "NVIDIA GH200 480GB": HOPPER_SXM,
    "NVIDIA H20": {"bf16": 148.0, "fp8": 296.0},
    "NVIDIA B200": B200,
    "NVIDIA B300 SXM6 AC": B200,
    "NVIDIA GB200": GB200,
    "NVIDIA GB300": GB200,
    "AMD Instinct MI300X": MI300,
    "AMD Instinct MI325X": MI300,
    "AMD Instinct MI355X": {"bf16": 2500.0, "fp8": 5033.0},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense FLOP/s of one device; None for a device or precision without a published figure.

    `device_name` is what `torch.cuda.get_device_name` returns and must match exactly: a slice of a
    device (MIG) or a variant with other clocks has another peak, and a wrong one gives a wrong MFU.
    """
    tflops = PEAK_TFLOPS.get(device_name, {}).get(precision)
    return None if tflops is None else tflops * 1e12


def matmul_weights(model: ModelConfig) -> int:
    """Weights that take part in a matrix product: the blocks' and the head's.

    The head counts even if it is tied to the embedding; looking up embeddings and norms do not, nor
    do vocabulary rows that only pad.
    """
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    block = model.hidden * (q + 2 * kv) + q * model.hidden + 3 * model.hidden * model.ffn
    return model.layers * block + model.hidden * model.vocab


def attended_pairs(cu_seqlens: Iterable[int]) -> int:
    """Query-key pairs under a causal mask that stays inside documents: Σ l(l+1)/2.

    `cu_seqlens` are the documents' bounds [n+1]; bounds repeated as padding add nothing. A tensor
    should be on the host.
    """
    # int() per element: a tensor's int32 would overflow at documents of 65 536 tokens.
    lengths = (end - start for start, end in pairwise(int(bound) for bound in cu_seqlens))
    return sum(length * (length + 1) // 2 for length in lengths)


def model_flops(model: ModelConfig, tokens: int, attended_pairs: int) -> float:
    """FLOPs of forward and backward over `tokens`, attention counted pair by pair.

    6 FLOPs per weight and token: a multiply and an add, once forward and twice backward. A pair of
    attention costs the same twice, for the scores and for the values. Megatron's formula
    (Narayanan et al. 2021, later with the causal half) with documents instead of one sequence:
    its Σ l² / 2 is Σ l(l+1)/2 here, the diagonal included.
    """
    attention = 12 * model.layers * model.heads * model.head_dim * attended_pairs
    return float(6 * matmul_weights(model) * tokens + attention)


def palm_flops(model: ModelConfig, tokens: int, seq_len: int) -> float:
    """FLOPs if every token attends `seq_len` tokens: PaLM's formula, which torchtitan reports, too.

    Chowdhery et al. 2022, appendix B. Neither causal mask nor documents are discounted.
    """
    attention = 12 * model.layers * model.heads * model.head_dim * seq_len
    return float((6 * matmul_weights(model) + attention) * tokens)
