"""Times the fused ops on a GPU beside PyTorch eager, torch.compile, Liger and torch's optimizer.

    python kernels/bench/run.py --output FOLDER [--ops rms_norm swiglu] [--shapes 1b 8b]
        [--part 1/3] [--seconds 0.5]

First the two ceilings, a copy and a matrix product; then every op, forward and backward, at the
shapes of Llama 1B to 405B. What each implementation computes is compared with float64 arithmetic,
the loss with float32. FOLDER gets `results.json` and `results.md`, anew after every op, so that
nothing is lost when time runs out, and plots in the end. What it holds already is kept, and later
rows replace earlier ones. A part takes every n-th pair of op and shape.

Without a GPU this is a dry run: tiny shapes, kernels in Triton's interpreter, graphs of
torch.compile traced but not compiled. Its times say nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from plots import plot
from report import Bench, Row, latest_rows, read_benches, subtitle, write_report
from shapes import MODELS, Shape, shape, tiny
from timing import alternate, copy_bandwidth, product_rate

OPS = {
    "rms_norm": "blocks:rms_norm",
    "add_rms_norm": "blocks:add_rms_norm",
    "swiglu": "blocks:packed_swiglu",
    "rope": "blocks:rotation",
    "linear_cross_entropy": "loss:linear_and_cross_entropy",
    "grad_norm": "optimizer:gradient_norm",
    "adamw": "optimizer:optimizer_step",
}
"""Where the cases of each op are made; imported only once the environment is right."""
DRY_SHAPES = ["1b"]
PACKAGES = ("torch", "triton", "liger-kernel")


def main() -> int:
    """Measure what is asked for; returns the exit code."""
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dry = device.type == "cpu"
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
        print("DRY RUN: no GPU. Tiny shapes; the times say nothing.", flush=True)
    torch.manual_seed(0)
    seconds = 0.0 if dry else options.seconds
    bench = Bench(
        conditions=conditions(device),
        dry_run=dry,
        copy_gb_s=1e-9 * copy_bandwidth(device, seconds),
        product_tflops=1e-12 * product_rate(device, seconds),
    )
    print(
        f"copy {bench.copy_gb_s:,.0f} GB/s, product {bench.product_tflops:,.1f} TFLOP/s", flush=True
    )
    options.output.mkdir(parents=True, exist_ok=True)
    earlier = read_benches(options.output)
    shapes = options.shapes or (DRY_SHAPES if dry else [*MODELS])
    pairs = [(op, name) for name in shapes for op in options.ops]
    number, parts = options.part
    for op, name in pairs[number - 1 :: parts]:
        began = time.perf_counter()
        sizes = tiny(name) if dry else shape(name)
        for row in op_rows(op, sizes, bench, seconds, device):
            bench.rows.append(row)
            print(row.line(), flush=True)
        write_report(options.output, [*earlier, bench])
        print(f"{op} {name}: {time.perf_counter() - began:.0f} s", flush=True)
    benches = [*earlier, bench]
    plot(options.output, latest_rows(benches), subtitle(benches))
    return 0


def op_rows(
    op: str, sizes: Shape, bench: Bench, seconds: float, device: torch.device
) -> Iterator[Row]:
    """All passes of an op at one shape; what fails is a row that says why."""
    module, function = OPS[op].split(":")
    make = getattr(import_module(module), function)
    torch.compiler.reset()  # or shapes would be compiled for any size from the second on
    try:
        for case in make(sizes, device):
            yield from case_rows(case, bench, seconds, device)
    except Exception as problem:  # out of memory, or an API that this version lacks
        yield Row(op, "", sizes.name, "all", problem=_short(problem))
    _free()


def case_rows(case: Any, bench: Bench, seconds: float, device: torch.device) -> Iterator[Row]:
    """Check each implementation, then time those that run, alternating."""
    compare = import_module("case").difference
    rows, timed = [], {}
    for name, run in case.runs.items():
        row = Row(case.op, case.what, case.shape, name)
        rows.append(row)
        try:
            state = run.prepare()
            before = _start_of_peak(device)
            result = run.run(state)
            if before is not None:
                row.peak_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            row.difference = compare(run.compared(result), case.expected)
        except Exception as problem:
            row.problem = _short(problem)
            continue
        finally:
            state = result = None
            _free()
        if not row.difference <= case.limit:
            row.problem = f"wrong: off by {row.difference:.1e}"
        timed[name] = (run.prepare, run.run)
    found = alternate(timed, seconds, device)
    floor_s = (case.bytes or 0) / (1e9 * bench.copy_gb_s) + case.flops / (
        1e12 * bench.product_tflops
    )
    for row in rows:
        for name, value in found.get(row.implementation, {}).items():
            setattr(row, name, value)
        if row.ms is not None and case.bytes is not None:
            row.of_floor = 1e3 * floor_s / row.ms
            row.gb_s = None if case.flops else 1e-6 * case.bytes / row.ms
        yield row


def conditions(device: torch.device) -> dict[str, str]:
    """What the numbers depend on."""
    found = {"date": str(date.today()), "commit": _commit(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    if device.type == "cpu":
        return {"device": "none, DRY RUN", **found}
    about = torch.cuda.get_device_properties(device)
    memory = f"{about.total_memory / 2**30:.0f} GiB, L2 {about.L2_cache_size / 2**20:.0f} MiB"
    return {"device": about.name, "memory": memory, "CUDA": str(torch.version.cuda), **found}


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=, changed"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _start_of_peak(device: torch.device) -> int | None:
    """Bytes in use now; None on CPU, where nobody counts."""
    if device.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(problem: Exception) -> str:
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[-1][:120]}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=[*OPS])
    parser.add_argument("--shapes", nargs="+", choices=MODELS, help="all; in a dry run 1b")
    parser.add_argument("--part", type=_part, default=(1, 1), help="i/n: a share of the work")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each row")
    return parser.parse_args()


def _part(text: str) -> tuple[int, int]:
    try:
        number, parts = (int(x) for x in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give i/n, such as 1/3") from None
    if not 1 <= number <= parts:
        raise argparse.ArgumentTypeError(f"{text}: parts count from 1")
    return number, parts


if __name__ == "__main__":
    sys.exit(main())
