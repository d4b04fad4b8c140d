"""Triton, where it is installed, and which tensors its kernels run on.

Without Triton every op computes by its PyTorch reference. `TRITON_INTERPRET=1`, set before the
first import of this package, runs the kernels on CPU tensors in Triton's interpreter.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ModuleNotFoundError:
    triton = None
    INTERPRETED = False

    def jit(kernel: Any) -> Any:
        """Leave a kernel as it is: it is never launched."""
        return kernel

    tl: Any = SimpleNamespace(constexpr=int)  # type: ignore[no-redef]


OPTIONS = {"enable_fp_fusion": True}
"""Of every launch: a product and a sum may become one operation, which Triton 3.10 has to be told.
"""


def launches(x: Tensor) -> bool:
    """Whether an op runs its kernel on `x`: on a GPU or in the interpreter, and not in float64,
    which kernels would compute in float32.
    """
    on_device = x.is_cuda or (INTERPRETED and x.device.type == "cpu")
    return triton is not None and on_device and x.dtype != torch.float64


def compute_units(x: Tensor) -> int:
    """Streaming multiprocessors of the GPU that holds `x`; a few for the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is float64: the one rule for upcasts, so that a float64
    run stays float64 throughout.
    """
    return x if x.dtype == torch.float64 else x.float()


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
