"""How the kernels are compiled for Llama's shapes: aligned rows of unit stride, in bf16."""

from collections.abc import Iterator

from megallama_kernels import cross_entropy, rms_norm, rope, swiglu
from megallama_kernels.language import next_power_of_2

from tests.kernels.cross_compile import Variant

HIDDEN = (2048, 4096, 8192, 16384)
HEAD_DIM = (64, 128)


def variants(arch: int) -> list[Variant]:
    """Of every kernel of the model, for one architecture."""
    return [*_rms_norm(arch), *_swiglu(arch), *_rope(arch), *_cross_entropy(arch)]


def _rms_norm(arch: int) -> Iterator[Variant]:
    statistic = {"rstd_ptr": "fp32"}
    forward = _bf16("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "stream_ptr") | statistic
    backward = _bf16("dy_ptr", "dstream_ptr", "x_ptr", "weight_ptr", "dx_ptr") | statistic
    for columns in HIDDEN:
        for add in (False, True):
            label = f"d={columns}{' add' if add else ''}"
            options = rms_norm.forward_options(columns)
            warps = options.pop("num_warps")
            constants = {"x_column": 1, "residual_column": 1, "EPS": 1e-5, "ADD": add}
            constants |= options | {"COLUMNS": columns}
            yield Variant("rms_norm", "_forward", forward, constants, warps, arch, ("rows",), label)
            options = rms_norm.backward_options(columns)
            warps = options.pop("num_warps")
            constants = {"dy_column": 1, "dstream_column": 1, "x_column": 1, "ADD": add}
            constants |= options | {"COLUMNS": columns, "LONG": rms_norm.LONG}
            pointers = backward | {"partial_ptr": "fp32"}
            yield Variant(
                "rms_norm", "_backward", pointers, constants, warps, arch, ("rows",), label
            )


def _swiglu(arch: int) -> Iterator[Variant]:
    packed = {"packed_feature": 2, "packed_kind": 1, "SIDE_BY_SIDE": True, "BLOCK": swiglu.BLOCK}
    forward = _bf16("packed_ptr", "y_ptr")
    yield Variant("swiglu", "_forward", forward, packed, swiglu.WARPS, arch)
    backward = _bf16("dy_ptr", "packed_ptr", "dpacked_ptr")
    constants = packed | {"dy_feature": 1}
    yield Variant("swiglu", "_backward", backward, constants, swiglu.WARPS, arch)


def _rope(arch: int) -> Iterator[Variant]:
    pointers = _bf16("x_ptr", "y_ptr") | {"cos_ptr": "fp32", "sin_ptr": "fp32"}
    pointers |= {"position_ptr": "i32"}
    for head_dim in HEAD_DIM:
        half = head_dim // 2
        block = next_power_of_2(half)
        constants = {"x_feature": 1, "HALF": half, "ROWS": rope.TILE // block, "BLOCK": block}
        odd = ("sign", "heads", "heads_in_all")
        label = f"head_dim={head_dim}"
        yield Variant("rope", "_turn", pointers, constants, rope.WARPS, arch, odd, label)


def _cross_entropy(arch: int) -> Iterator[Variant]:
    block, warps = {"BLOCK": cross_entropy.BLOCK}, cross_entropy.WARPS
    pointers = _bf16("logits_ptr") | {"label_ptr": "i64", "out_ptr": "fp32"}
    odd = ("rows", "first")
    yield Variant("cross_entropy", "_statistics", pointers, block, warps, arch, odd)
    pointers = _bf16("logits_ptr") | {"label_ptr": "i64"}
    pointers |= {"log_sum_exp_ptr": "fp32", "scale_ptr": "fp32"}
    constants = block | {"IGNORED": cross_entropy.IGNORED_LABEL}
    yield Variant("cross_entropy", "_gradient", pointers, constants, warps, arch, odd)


def _bf16(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "bf16")
