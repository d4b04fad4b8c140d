"""The contract of the adapters to NVIDIA's apex; it runs where apex is built."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megallama.config.schema import KernelsConfig
from megallama.model.kernels import choose_kernels
from megallama.train.optimizer import fused_by_apex
from tests.kernels.checks import assert_near, random

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def apex():
    return pytest.importorskip("amp_C", reason="needs NVIDIA's apex, built with its extensions")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_rms_norm(dtype):
    kernels = choose_kernels(KernelsConfig(rms_norm="apex"), "cuda")
    x, residual, dy = (random(40, 256, dtype=dtype, seed=s).cuda() for s in range(3))
    weight = random(256, dtype=dtype, seed=3).cuda()
    inputs = [t.requires_grad_() for t in (x, residual, weight)]
    y, stream = kernels.add_rms_norm(*inputs, 1e-5)
    found = torch.autograd.grad(y, inputs, dy)
    wide = stream.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    exact_y = F.rms_norm(wide, (256,), wide_weight, 1e-5)
    exact = torch.autograd.grad(exact_y, (wide, wide_weight), dy.double())
    assert_near(y, exact_y, dtype, "y")
    for mine, true in zip(found, (exact[0], exact[0], exact[1]), strict=True):
        assert_near(mine, true, dtype)


def test_fused_adam_steps_like_torch():
    ours = [random(n, dtype=torch.float32, seed=n).cuda() for n in (5, 1000)]
    theirs = [p.clone().requires_grad_() for p in ours]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments = [[torch.zeros_like(p) for p in ours] for _ in range(2)]
    for step in range(1, 6):
        gradients = [random(len(p), dtype=torch.float32, seed=step).cuda() for p in ours]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = 0.5 * gradient
        optimizer.step()
        fused_by_apex(
            ours,
            gradients,
            *moments,
            clip=torch.tensor(0.5).cuda(),
            lr=1e-2,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            step=step,
        )
    for mine, true in zip(ours, theirs, strict=True):
        assert_near(mine, true.detach().double(), torch.float32)
