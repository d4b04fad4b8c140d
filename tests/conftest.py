"""Before any test: one forkserver for all multi-rank tests, a cache of our own, one thread."""

import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
from megallama_launch.forkserver import PRELOAD, start_forkserver

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    cache = tempfile.TemporaryDirectory(prefix="megallama-cache-")
    config.add_cleanup(cache.cleanup)
    os.environ["MEGALLAMA_CACHE"] = cache.name
    os.environ["OMP_NUM_THREADS"] = "1"
    if not _has_cuda():
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

    # a shared machine is slow at times, and a failure in CI must come back on the next run
    hypothesis.settings.register_profile("ours", deadline=None, derandomize="CI" in os.environ)
    hypothesis.settings.load_profile("ours")

    if not config.option.collectonly:
        start_forkserver([*PRELOAD, "pytest", "_pytest.assertion.rewrite", *_our_modules()])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def _our_modules() -> list[str]:
    """Every module of the package, as far as it exists, but the one that runs the command."""
    folders = (ROOT / "megallama", ROOT / "kernels" / "megallama_kernels")
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    parts = [_module_of(file) for file in files]
    names = [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts if p[-1] != "__main__"]
    return [*names, "tests.ranks"]


def _module_of(file: Path) -> tuple[str, ...]:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1:] if parts[0] == "kernels" else parts


def _has_cuda() -> bool:
    if "torch" not in sys.modules and not Path("/dev/nvidiactl").exists():
        return False  # without the seconds that an import of torch takes
    import torch

    return torch.cuda.is_available()
