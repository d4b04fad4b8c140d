"""Says what computes the fused operations and attention, asked of torch where torch decides."""

from collections import defaultdict

import torch
from torch.nn.attention import SDPBackend

from megallama.config.schema import Config
from megallama.model.kernels import implementation
from megallama.parallel.data import COMPUTE_DTYPE


def kernels_text(config: Config, device: torch.device) -> str:
    """Like `triton; attention flex`, or `torch (rms_norm: apex); attention CUDNN_ATTENTION`."""
    by_name = defaultdict(list)
    for operation, asked in config.kernels:
        if operation != "attention":
            by_name[implementation(asked, device.type)].append(operation)
    usual = max(by_name, key=lambda name: len(by_name[name]))
    others = [f"{', '.join(ops)}: {name}" for name, ops in by_name.items() if name != usual]
    text = f"{usual} ({'; '.join(others)})" if others else usual
    return f"{text}; attention {attention_text(config, device)}"


def attention_text(config: Config, device: torch.device) -> str:
    """What a step's attention is computed by."""
    layout = config.layout
    if not config.data.document_mask and layout.context == 1:
        return sdpa_backend(config, device)
    if device.type != "cuda":
        return "SDPA, document by document"
    if config.kernels.attention != "auto":
        return config.kernels.attention
    head_and_tail = layout.context_method == "all_gather" and layout.context_balance == "head_tail"
    bf16 = config.train.precision == "bf16"
    return "varlen" if layout.context > 1 and head_and_tail and bf16 else "flex"


def sdpa_backend(config: Config, device: torch.device) -> str:
    """What scaled_dot_product_attention picks for this model, by torch's name for it.

    Raises:
        RuntimeError: it would write out the scores of bf16 training on a GPU.

    """
    model, tensor = config.model, config.layout.tensor
    dtype, T = COMPUTE_DTYPE[config.train.precision], config.data.seq_len
    q, k = (
        torch.empty(1, max(1, heads // tensor), T, model.head_dim, dtype=dtype, device=device)
        for heads in (model.heads, model.kv_heads)
    )
    choice = torch._fused_sdp_choice(
        q.requires_grad_(), k.requires_grad_(), k, is_causal=True, enable_gqa=True
    )
    backend = SDPBackend(choice)
    if backend == SDPBackend.MATH and device.type == "cuda" and dtype == torch.bfloat16:
        raise RuntimeError(
            f"no fused attention for model.head_dim = {model.head_dim} on this GPU: its scores "
            "would be written out"
        )
    return str(backend.name)
