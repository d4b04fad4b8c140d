"""The Triton kernels themselves, in the interpreter, under every axis against one process."""

from __future__ import annotations

import pytest

from megallama.config.errors import UserError
from megallama.verify.run import verify
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


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_give_the_numbers_of_torch(name):
    config = make_config(layout=LAYOUTS[name], train={"steps": STEPS})
    report = verify(config, dtype="float32", steps=STEPS, max_processes=8, kernels="interpreter")
    assert report.passed, [check for check in report.checks if not check.passed]
    errors = [check.error for check in report.checks if check.name == "gradients, step 1"]
    assert errors[0] > 0, "the same to the bit: other kernels can hardly have run"


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
