"""Kernels compiled for GPUs that are not there, and what the machine code says of each.

`compile_all` runs in processes of its own, without the interpreter; results are kept in Triton's
cache folder, by the hash of the machine code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
WARP = 32


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel."""

    module: str
    kernel: str
    pointers: Mapping[str, str]
    """Element types; arguments that are neither these nor constants are int32, multiples of 16."""
    constants: Mapping[str, object]
    warps: int
    arch: int
    odd: tuple[str, ...] = ()
    """Integers that need not be multiples of 16."""
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.kernel} {self.label} sm_{self.arch}".replace("  ", " ")


@dataclass(frozen=True)
class Code:
    """What the machine code holds."""

    registers: int
    stack: int
    spills: int
    """Loads and stores of local memory."""
    float64: int
    """Double-precision arithmetic."""
    loads: Mapping[int, int] = field(default_factory=dict)
    """Of global memory, by bits."""
    stores: Mapping[int, int] = field(default_factory=dict)


def compile_all(variants: list[Variant]) -> dict[str, Code]:
    """Compile in as many processes as there are cores."""
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return {v.name: c for v, c in zip(variants, pool.map(_compile, variants), strict=True)}


def _compile(variant: Variant) -> Code:
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from megallama_kernels.language import OPTIONS
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"megallama_kernels.{variant.module}"), variant.kernel)
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{variant.pointers[name]}" if name in variant.pointers else "i32"
        if name not in variant.odd:
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, dict(variant.constants), attributes)
    target = GPUTarget("cuda", variant.arch, WARP)
    compiled = triton.compile(source, target=target, options=OPTIONS | {"num_warps": variant.warps})
    kept = Path(triton.knobs.cache.dir) / "megallama" / f"{compiled.hash}.json"
    if kept.exists():
        plain = json.loads(kept.read_text())
        counts = {k: {int(b): n for b, n in plain[k].items()} for k in ("loads", "stores")}
        return Code(**(plain | counts))
    code = _read(compiled.asm["cubin"])
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(asdict(code)))
    return code


def _read(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage

    def widths(operation: str) -> dict[int, int]:
        counts: dict[int, int] = {}
        for line in re.findall(rf"\b{operation}\.[\w.]*", code):
            bits = re.search(r"\.[US]?(8|16|64|128|256)\b", line)
            width = int(bits[1]) if bits else 32
            counts[width] = counts.get(width, 0) + 1
        return counts

    return Code(
        registers=int(found[1]),
        stack=int(found[2]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        float64=len(re.findall(r"\bD(?:ADD|MUL|FMA)\b", code)),
        loads=widths("LDG"),
        stores=widths("STG"),
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run([folder / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
