"""The one rule for upcasts: to at least float32, so that a float64 run stays float64 throughout."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
