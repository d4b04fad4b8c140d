"""How the grad norm and AdamW are compiled in training."""

import triton.language as tl
from megallama_kernels import adamw, grad_norm

from tests.kernels.cross_compile import Variant

TABLES = {"addresses_ptr": "i64", "chunks_ptr": "i64"}


def variants(arch: int) -> list[Variant]:
    """Both storage schemes and both dtypes of the gradient, tensors that allow the widest loads."""
    found = []
    for dtype in (tl.bfloat16, tl.float32):
        found.append(
            Variant(
                "grad_norm",
                "_sum_squares",
                TABLES | {"partial_ptr": "fp32"},
                {"ELEMENT": dtype, "ALIGNED": True, "BLOCK": grad_norm.BLOCK},
                grad_norm.WARPS,
                arch,
                label=str(dtype),
            )
        )
        for split in (False, True):
            constants = {"BETA1": 0.9, "BETA2": 0.95, "EPS": 1e-8}
            tile = {"BLOCK": adamw.BLOCK, "TAIL": adamw.TAIL}
            found.append(
                Variant(
                    "adamw",
                    "_adamw",
                    TABLES | {"coefficients_ptr": "fp64"},
                    {**constants, **tile, "GRADIENT": dtype, "SPLIT": split, "ALIGNED": True},
                    adamw.WARPS,
                    arch,
                    label=f"{dtype} gradient, {'split' if split else 'whole'} master",
                )
            )
    return found
