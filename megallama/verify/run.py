"""Runs both sides of a verification and compares them."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from megallama_launch.local import run_local

from megallama.config.errors import UserError
from megallama.config.schema import Config, KernelsConfig
from megallama.mesh import AXES
from megallama.verify.compare import Report, compare
from megallama.verify.shrink import shrink, world_size

LAYOUT_TARGET = "megallama.verify.layout:run"
REFERENCE_TARGET = "megallama.verify.reference:run"
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
TIMEOUT_S = 600.0


class VerificationFailed(Exception):  # noqa: N818 - it says what happened
    """A side of the verification did not finish; what went wrong has been shown."""

    exit_code = 1


def verify(
    config: Config,
    *,
    dtype: str,
    steps: int,
    max_processes: int,
    kernels: str = "torch",
    layout_target: str = LAYOUT_TARGET,
) -> Report:
    """Train a shrunk twin of the config on its layout and in one process; compare.

    Args:
        config: any run.
        dtype: `float64`, `float32` or `bf16`.
        steps: optimizer steps.
        max_processes: the layout is shrunk to at most so many.
        kernels: what the layout computes with: `torch`, or the Triton kernels in the `interpreter`.
        layout_target: "module:function" that each rank runs; tests plant faults there.

    Raises:
        UserError: the config cannot be verified.
        VerificationFailed: a rank failed; its error has been shown.

    """
    if steps < 1:
        raise UserError.one("--steps", f"{steps}: give at least 1")
    if max_processes < 1:
        raise UserError.one("--processes", f"{max_processes}: give at least 1")
    config = config.model_copy(update={"kernels": _kernels(kernels, dtype)})
    twin, exact_twin = (
        shrink(config, dtype=d, steps=steps, max_processes=max_processes)
        for d in (dtype, "float64")
    )
    plain = twin.model_dump()
    processes = world_size(twin.layout)
    counts = micro_batch_counts(twin, dtype)
    exact_plain = exact_twin.model_dump()
    one_process = {f"reference-{count}": (plain, count) for count in counts}
    one_process |= {"exact": (exact_plain, 1)} if exact_plain != plain else {}
    with tempfile.TemporaryDirectory(prefix="megallama-verify-") as folder:
        _run_side(layout_target, processes, (plain, folder))
        _run_side(REFERENCE_TARGET, 1, (one_process, folder))
        ranks = [_read(folder, f"rank-{rank}.pt") for rank in range(processes)]
        references = [_read(folder, f"reference-{count}.pt") for count in counts]
        exact = _read(folder, "exact.pt") if "exact" in one_process else references[0]
    return Report(
        layout=layout_text(twin),
        model=model_text(twin),
        dtype=dtype,
        processes=processes,
        **compare(ranks, references, exact, dtype),
    )


def _kernels(asked: str, dtype: str) -> KernelsConfig:
    if asked == "torch":
        return _all_kernels("torch").model_copy(update={"adamw": "auto"})
    if dtype == "float64":
        raise UserError.one("--kernels", "interpreter computes in float32: add --dtype float32")
    if find_spec("triton") is None:
        raise UserError.one("--kernels", "interpreter needs Triton: pip install triton")
    return _all_kernels("triton")


def _all_kernels(name: str) -> KernelsConfig:
    return KernelsConfig.model_validate(
        dict.fromkeys(KernelsConfig.model_fields, name) | {"attention": "auto"}
    )


def micro_batch_counts(config: Config, dtype: str) -> list[int]:
    """Numbers of micro-batches of the one-process runs; several of them measure rounding."""
    samples = config.train.global_batch_tokens // config.data.seq_len
    if dtype == "float64":
        return [1]
    return sorted({1, 2, max(2, samples // 2), samples})


def layout_text(config: Config) -> str:
    """The axes that have more than one rank, and how they are used."""
    layout = config.layout
    axes = [f"{a} {n}" for a in reversed(AXES) if (n := getattr(layout, a)) > 1]
    details: list[str] = []
    if layout.context > 1:
        details += [layout.context_method, layout.context_balance]
    details += [layout.schedule] if layout.pipeline > 1 else []
    details += [f"{layout.virtual_stages} stages a rank"] if layout.virtual_stages > 1 else []
    return ", ".join([" x ".join(axes) or "one rank", *details])


def model_text(config: Config) -> str:
    """The shrunk model in a line."""
    model = config.model
    return (
        f"{model.layers} layers of {model.hidden}, {model.heads} query and {model.kv_heads} "
        f"key/value heads, ffn {model.ffn}, vocabulary {model.vocab}, sequences of "
        f"{config.data.seq_len}, {config.train.global_batch_tokens} tokens a step"
    )


def _run_side(target: str, processes: int, args: tuple[Any, ...]) -> None:
    outcome = run_local(target, processes, args, threads=1, env=ON_CPU, timeout_s=TIMEOUT_S)
    if outcome.exit_code:
        raise VerificationFailed(target)


def _read(folder: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(Path(folder) / name)
    return content
