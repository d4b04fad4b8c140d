"""Whatever computes the fused operations, the model's numbers are the same to rounding."""

from __future__ import annotations

import pytest
import torch

from megallama.config.schema import KernelsConfig
from megallama.model.kernels import choose_kernels
from megallama.model.llama import Llama
from tests.model.small import plan_of, small_config, small_model

T, LENGTHS = 48, [20, 28]


@pytest.mark.parametrize("name", ["triton", pytest.param("compile", marks=pytest.mark.slow)])
def test_kernels_compute_what_torch_computes(name):
    config = small_config()
    exact = small_model(config, torch.float64)
    chosen = KernelsConfig(rms_norm=name, swiglu=name, rotary=name, cross_entropy=name)
    model = Llama(config, kernels=choose_kernels(chosen, "cpu"))
    model.load_state_dict(exact.state_dict())
    tokens, labels = torch.randint(200, (2, T), generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(0.1)
    loss = model(tokens, plan_of(config, LENGTHS, torch.float32), labels, scale)
    expected = exact(tokens, plan_of(config, LENGTHS, torch.float64), labels, scale)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    wanted = {n: p.grad for n, p in exact.named_parameters()}
    for parameter, p in model.named_parameters():
        off = (p.grad.double() - wanted[parameter]).norm() / wanted[parameter].norm()
        assert off < 1e-5, f"{parameter}: {off:.1e}"
    with torch.no_grad():
        logits = model(tokens, plan_of(config, LENGTHS, torch.float32))
        assert logits.shape == (T, config.vocab)
