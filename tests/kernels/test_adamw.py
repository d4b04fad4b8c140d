"""AdamW of many tensors in both storage schemes, against torch's in float64.

Nothing in the kernel is rounded to bfloat16, which the interpreter would truncate: what is seen
there is what a GPU computes, up to float32 arithmetic.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megallama_kernels.adamw import _coefficients, adamw_, adamw_split_, join, launch, split
from megallama_kernels.language import launches
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = 256
"""Elements of a chunk: the interpreter takes milliseconds a program."""
SIZES = st.sampled_from([0, 1, 15, 16, 17, 255, 256, 257, 1000])
BETAS = {"beta1": 0.9, "beta2": 0.95}
SETTINGS = {**BETAS, "eps": 1e-8, "weight_decay": 0.1}
RATES = [1e-2, 3e-3, 5e-3]


@dataclass
class State:
    parameters: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


def draw(sizes: list[int], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(DEVICE, dtype) for n in sizes]


def fresh(sizes: list[int], seed: int, dtype: torch.dtype = torch.float32) -> State:
    parameters = draw(sizes, seed, dtype)
    moments = [[torch.zeros_like(x) for x in parameters] for _ in range(2)]
    return State(parameters, *moments)


def scalar(x: float) -> Tensor:
    return torch.tensor(x, device=DEVICE)


def lists(state: State, gradients: list[Tensor]) -> tuple[list[Tensor], ...]:
    return state.parameters, gradients, state.exp_avg, state.exp_avg_sq


def kernel_step(
    state: State, gradients: list[Tensor], step: int, clip: float = 0.5, low: Any = None
) -> None:
    """In chunks small enough that there are several."""
    beta1, beta2 = BETAS.values()
    coefficients = _coefficients(scalar(clip), RATES[step - 1], step, beta1, beta2, 0.1)
    tensors = (*lists(state, gradients), *([] if low is None else [low]))
    launch(tensors, coefficients, beta1, beta2, SETTINGS["eps"], SMALL)


def of_torch(sizes: list[int], gradients: list[list[Tensor]], clip: float = 0.5) -> list[Tensor]:
    """Parameters after a step with each of the gradients, in float64."""
    parameters = [x.double().requires_grad_() for x in draw(sizes, 0)]
    optimizer = torch.optim.AdamW(
        parameters, betas=tuple(BETAS.values()), eps=SETTINGS["eps"], weight_decay=0.1
    )
    for lr, now in zip(RATES, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for parameter, gradient in zip(parameters, now, strict=True):
            parameter.grad = gradient.double() * clip
        optimizer.step()
    return [x.detach() for x in parameters]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-7)


def test_these_tests_run_the_kernel() -> None:
    assert launches(torch.empty(0, device=DEVICE))


@settings(max_examples=10)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_steps_are_those_of_torch_in_both_schemes(sizes: list[int], dtype: torch.dtype) -> None:
    gradients = [draw(sizes, seed, dtype) for seed in (1, 2, 3)]
    whole, halves = fresh(sizes, 0), fresh(sizes, 0)
    pairs = [split(x) for x in halves.parameters]
    halves.parameters, low = [high for high, _ in pairs], [low for _, low in pairs]
    for step, now in enumerate(gradients, 1):
        kernel_step(whole, now, step)
        kernel_step(halves, now, step, low=low)
    assert_near(whole.parameters, of_torch(sizes, gradients))
    masters = [join(*pair) for pair in zip(halves.parameters, low, strict=True)]
    for found, expected in zip(
        [*masters, *halves.exp_avg, *halves.exp_avg_sq],
        [*whole.parameters, *whole.exp_avg, *whole.exp_avg_sq],
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_goes_over_several_blocks(dtype: torch.dtype) -> None:
    sizes = [2 * 1024 + 3 * 128 + 1]
    gradients = [draw(sizes, seed, dtype) for seed in (1, 2, 3)]
    whole, high = fresh(sizes, 0), fresh(sizes, 0)
    halves = [[half] for half in split(high.parameters[0])]
    for step, now in enumerate(gradients, 1):
        arguments = SETTINGS | {"clip": scalar(0.5), "lr": RATES[step - 1], "step": step}
        adamw_(*lists(whole, now), **arguments)
        adamw_split_(*halves, now, high.exp_avg, high.exp_avg_sq, **arguments)
    assert_near(whole.parameters, of_torch(sizes, gradients))
    assert torch.equal(join(halves[0][0], halves[1][0]), whole.parameters[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64_is_torch_to_the_last_digits(dtype: torch.dtype) -> None:
    sizes = [17, 0, 3]
    gradients = [draw(sizes, seed, dtype) for seed in (1, 2, 3)]
    state = fresh(sizes, 0, torch.float64)
    for step, now in enumerate(gradients, 1):
        clip = torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
        adamw_(*lists(state, now), clip=clip, lr=RATES[step - 1], step=step, **SETTINGS)
    for found, expected in zip(state.parameters, of_torch(sizes, gradients), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


def test_the_reference_steps_a_split_master_as_a_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megallama_kernels.adamw.launches", lambda _: False)
    whole, other = fresh([300], 0), fresh([300], 0)
    high, low = split(other.parameters[0])
    for step in (1, 2, 3):
        arguments = SETTINGS | {"clip": scalar(0.5), "lr": RATES[step - 1], "step": step}
        now = draw([300], step)
        adamw_(*lists(whole, now), **arguments)
        adamw_split_([high], [low], now, other.exp_avg, other.exp_avg_sq, **arguments)
    assert torch.equal(join(high, low), whole.parameters[0])
    assert_near(whole.parameters, of_torch([300], [draw([300], seed) for seed in (1, 2, 3)]))


def test_clipping_inside_is_clipping_first() -> None:
    inside, first = fresh([300, 7], 0), fresh([300, 7], 0)
    for step in (1, 2, 3):
        gradients = draw([300, 7], step)
        kernel_step(inside, gradients, step, clip=0.37)
        kernel_step(first, [g * 0.37 for g in gradients], step, clip=1.0)
    assert_near(inside.parameters, [x.double() for x in first.parameters])
    assert_near(inside.exp_avg, [x.double() for x in first.exp_avg])
    assert not torch.equal(inside.exp_avg[0], fresh([300, 7], 0).exp_avg[0])


def test_tensors_that_lie_at_odd_addresses() -> None:
    aligned, odd = fresh([600], 0), fresh([600], 0)
    odd.parameters[0] = torch.cat([scalar(7.0)[None], odd.parameters[0]])[1:]
    gradients = draw([600], 1)
    kernel_step(aligned, gradients, 1)
    kernel_step(odd, gradients, 1)
    assert torch.equal(odd.parameters[0], aligned.parameters[0])


def test_rate_and_step_are_numbers_or_tensors() -> None:
    numbers, tensors = fresh([40], 0), fresh([40], 0)
    gradients, clip = draw([40], 1), scalar(0.5)
    adamw_(*lists(numbers, gradients), clip=clip, lr=0.01, step=3, **SETTINGS)
    rate = torch.tensor(0.01, dtype=torch.float64)
    adamw_(*lists(tensors, gradients), clip=clip, lr=rate, step=torch.tensor(3), **SETTINGS)
    assert torch.equal(numbers.parameters[0], tensors.parameters[0])


def test_parameters_that_want_gradients_of_any_shape() -> None:
    parameter = torch.ones((), device=DEVICE, requires_grad=True)
    moments = [torch.zeros((), device=DEVICE) for _ in range(2)]
    lists_of_one = [parameter], [scalar(2.0)], [moments[0]], [moments[1]]
    adamw_(*lists_of_one, clip=scalar(1.0), lr=0.25, step=1, **SETTINGS)
    assert parameter.item() == pytest.approx(1 - 0.25 * 0.1 - 0.25)  # the first step is one rate


def test_nothing_to_step() -> None:
    state = fresh([0, 0], 0)
    adamw_(*lists(state, draw([0, 0], 1)), clip=scalar(1.0), lr=0.1, step=1, **SETTINGS)


@pytest.mark.parametrize("which", ["parameters", "exp_avg", "exp_avg_sq"])
def test_the_kernel_writes_its_own_dtypes_only(which: str) -> None:
    state = fresh([8], 0)
    setattr(state, which, [x.bfloat16() for x in getattr(state, which)])
    with pytest.raises(ValueError, match="dtype"):
        kernel_step(state, draw([8], 1), 1)


def test_sizes_and_strides_are_checked() -> None:
    state = fresh([12], 0)
    with pytest.raises(ValueError, match="differ in size"):
        kernel_step(state, draw([11], 1), 1)
    with pytest.raises(ValueError, match="contiguous"):
        kernel_step(state, [x[::2] for x in draw([24], 1)], 1)


BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64)
SPECIAL = [0x0, 0x80000000, 0x1, 0x80000001, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF]
FINITE = [0x0, 0x80000000, 0x1, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F80FFFF, 0xBF808000]


def floats(bits: list[int]) -> Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32)).to(DEVICE)


def bits_of(x: Tensor) -> list[int]:
    return x.cpu().view(torch.int32).numpy().view(np.uint32).tolist()


@given(bits=BITS)
def test_split_and_join_keep_every_bit(bits: list[int]) -> None:
    bits = bits + SPECIAL
    high, low = split(floats(bits))
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert high.cpu().view(torch.int16).numpy().view(np.uint16).tolist() == [b >> 16 for b in bits]
    assert low.cpu().numpy().view(np.uint16).tolist() == [b & 0xFFFF for b in bits]
    assert bits_of(join(high, low)) == bits


@settings(max_examples=10)
@given(bits=BITS)
def test_the_kernel_joins_and_splits_every_bit(bits: list[int]) -> None:
    """A step at rate zero moves nothing."""
    bits = [b for b in bits if b & 0x7F800000 != 0x7F800000] + FINITE
    high, low = split(floats(bits))
    zeros = [torch.zeros(len(bits), device=DEVICE) for _ in range(3)]
    lists_of_one = [[x] for x in (high, low, *zeros)]
    adamw_split_(*lists_of_one, clip=scalar(1.0), lr=0.0, step=1, **SETTINGS)
    assert bits_of(join(high, low)) == bits


def test_a_new_rate_compiles_nothing_anew() -> None:
    state, eager = fresh([20], 0), fresh([20], 0)
    step = torch.compile(adamw_, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t, lr in enumerate(RATES, 1):
            gradients = draw([20], t)
            for run, on in ((step, state), (adamw_, eager)):
                tensors = {"clip": scalar(0.5), "lr": scalar(lr), "step": scalar(float(t))}
                run(*lists(on, gradients), **tensors, **SETTINGS)
    assert torch.equal(state.parameters[0], eager.parameters[0])


def test_the_ops_are_registered_as_torch_asks() -> None:
    state, gradients = fresh([5, 20], 0), draw([5, 20], 1)
    numbers = _coefficients(scalar(0.5), 0.1, 1, 0.9, 0.95, 0.1), 0.9, 0.95, 1e-8
    torch.library.opcheck(torch.ops.megallama.adamw, (*lists(state, gradients), *numbers))
    high, low = (list(x) for x in zip(*map(split, state.parameters), strict=True))
    halves = (high, low, gradients, state.exp_avg, state.exp_avg_sq)
    torch.library.opcheck(torch.ops.megallama.adamw_split, (*halves, *numbers))
