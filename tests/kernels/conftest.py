"""Kernels are tested on a GPU where there is one, and in Triton's interpreter elsewhere."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def device():
    # Not above: this file is imported before the interpreter is turned on.
    from megallama_kernels.language import launches

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(kind):
        assert launches(torch.zeros(1)), "these tests would test the references alone"
        yield kind
