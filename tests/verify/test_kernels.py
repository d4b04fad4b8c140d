"""The Triton kernels themselves, in the interpreter, under every axis against one process."""

from __future__ import annotations

import pytest

from megallama.config.errors import UserError
from megallama.verify.run import VerificationFailed, verify
from tests.verify.layouts import make_config

STEPS = 2
LAYOUTS = {
    "one process": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "FSDP2": {"data_shard": 2},
    "TP2 CP2 PP2": {"tensor": 2, "context": 2, "pipeline": 2},
}

KERNELS = (
    "rms_norm._forward",
    "rms_norm._backward",
    "swiglu._forward",
    "swiglu._backward",
    "rope._turn",
    "cross_entropy._statistics",
    "cross_entropy._gradient",
    "grad_norm._sum_squares",
    "adamw._adamw",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_give_the_numbers_of_torch(name):
    config = make_config(layout=LAYOUTS[name], train={"steps": STEPS})
    report = verify(config, dtype="float32", steps=STEPS, max_processes=8, kernels="interpreter")
    assert report.passed, [check for check in report.checks if not check.passed]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["elementwise", "selective", "full"])
def test_kernels_under_recomputation(policy):
    train = {"steps": STEPS, "activation_checkpointing": policy}
    config = make_config(layout={"tensor": 2}, train=train)
    report = verify(config, dtype="float32", steps=STEPS, max_processes=8, kernels="interpreter")
    assert report.passed, [check for check in report.checks if not check.passed]


def test_kernels_do_not_compute_in_float64():
    with pytest.raises(UserError, match="add --dtype float32"):
        verify(make_config(), dtype="float64", steps=1, max_processes=1, kernels="interpreter")


def verify_with_stand_in(config):
    return verify(
        config,
        dtype="float32",
        steps=STEPS,
        max_processes=1,
        kernels="interpreter",
        layout_target="tests.verify.faults:run_from_environment",
    )


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_launched(kernel, config_for, monkeypatch):
    """Without its launch the numbers are wrong."""
    monkeypatch.setenv("SILENT_KERNEL", kernel)
    monkeypatch.setenv("PLANTED_FAULT", "kernel_is_not_launched")
    try:
        report = verify_with_stand_in(config_for())
    except VerificationFailed:
        return  # what was not written may be no numbers at all
    assert not report.passed


@pytest.mark.slow
def test_it_is_the_missing_launch_that_is_wrong(config_for, monkeypatch):
    monkeypatch.setenv("SILENT_KERNEL", "rope._turn")
    monkeypatch.setenv("PLANTED_FAULT", "kernel_is_not_launched")
    monkeypatch.setenv("LAUNCHED_AFTER_ALL", "1")
    assert verify_with_stand_in(config_for()).passed
