"""What elementwise recomputation gives and what it saves."""

from __future__ import annotations

import gc

import pytest
import torch

from megallama.config.schema import KernelsConfig
from megallama.model.kernels import Kernels, choose_kernels
from megallama.model.llama import Llama
from megallama.parallel.recompute import wrap_block
from tests.model.small import plan_of, small_config, small_model

T = 48
LENGTHS = [20, 28]


def model_with(kernels: Kernels, policy: str) -> Llama:
    config = small_config()
    model = Llama(config, kernels=kernels)
    model.load_state_dict(small_model(config, torch.float32).state_dict())
    for block in model.layers.values():
        wrap_block(block, activation_checkpointing=policy, compile_block=False)
    return model


def run(model: Llama) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, gradients, and bytes that live from forward to backward."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(200, (2, T), generator=generator)
    plan = plan_of(small_config(), LENGTHS, torch.float32)
    gc.collect()  # what earlier runs left must not be freed in between
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = model(tokens, plan, labels, torch.tensor(0.1))
        gc.collect()
    events = profile.profiler.kineto_results.events()
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters()}, held


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_elementwise_gives_the_same_and_keeps_less(name):
    kernels = choose_kernels(
        KernelsConfig(rms_norm=name, swiglu=name, rotary=name, cross_entropy=name), "cpu"
    )
    run(model_with(kernels, "none"))  # what is kept for ever is kept from here on
    loss, gradients, held = run(model_with(kernels, "none"))
    again, of_again, less = run(model_with(kernels, "elementwise"))
    assert torch.equal(again, loss)
    for parameter, gradient in gradients.items():
        assert torch.equal(of_again[parameter], gradient), parameter
    config = small_config()
    results = T * (2 * config.hidden + config.ffn) * 4
    assert held - less == pytest.approx(config.layers * results, rel=0.02)
