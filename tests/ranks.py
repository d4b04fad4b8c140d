"""`@ranks(4)` runs the body of a test in four processes that share a gloo process group.

Each test gets fresh processes forked from one forkserver that has imported torch (conftest starts
it), so four ranks cost a tenth of a second and nothing leaks from one test into the next. A test
fails with the traceback and the output of the rank that failed first; a hang, with all stacks.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.util
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from types import CodeType

import pytest
from megallama_launch.claims import STORE
from megallama_launch.local import run_local
from megallama_launch.outcome import Outcome

SHOWN_CHARACTERS = 4000


def ranks(world_size: int, *, timeout_s: float = 120.0) -> Callable[[Callable], Callable]:
    """Run the decorated function in `world_size` ranks; its arguments must pickle.

    Parametrization and fixtures work as usual. In the body, torch.distributed is initialised,
    random numbers are seeded alike in every rank, and there is one thread a rank.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(**kwargs: object) -> None:
            __tracebackhide__ = True
            outcome = run_local(
                "tests.ranks:run_body",
                world_size,
                (body.__module__, body.__name__, pickle.dumps(kwargs), timeout_s),
                threads=1,
                timeout_s=timeout_s,
                capture=True,
            )
            try:
                if outcome.exit_code:
                    pytest.fail(explain(outcome), pytrace=False)
            finally:
                shutil.rmtree(outcome.outputs[0].parent)

        return test

    return decorate


def explain(outcome: Outcome) -> str:
    """The outcome's text and what the failed rank, or else every killed one, printed last."""
    shown = outcome.killed if outcome.failed_rank is None else (outcome.failed_rank,)
    printed = {rank: outcome.outputs[rank].read_text(errors="replace") for rank in shown}
    parts = [f"--- rank {r} printed ---\n{t[-SHOWN_CHARACTERS:]}" for r, t in printed.items() if t]
    return "\n".join([outcome.text, *parts])


def run_body(module: str, name: str, kwargs: bytes, timeout_s: float) -> None:
    """In a rank: run the body that `@ranks` keeps of the test `module`.`name`.

    Its arguments come pickled: they may be of classes of that module, which is imported only here.
    """
    import torch
    from torch import distributed

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    body = getattr(_import_with_explained_asserts(module), name).__wrapped__
    torch.manual_seed(1234)
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(os.environ[STORE], world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s + 60),  # a hang is the parent's to report
    )
    body(**pickle.loads(kwargs))
    distributed.barrier()
    distributed.destroy_process_group()


class _ExplainedAsserts(importlib.machinery.SourceFileLoader):
    """Compiles a test module the way pytest does, so that a failed assert shows its values."""

    def get_code(self, fullname: str) -> CodeType:
        from _pytest.assertion.rewrite import rewrite_asserts

        source = self.get_data(self.path)
        tree = ast.parse(source, self.path)
        rewrite_asserts(tree, source)
        return compile(tree, self.path, "exec", dont_inherit=True)


def _import_with_explained_asserts(name: str):
    found = importlib.util.find_spec(name)
    assert found and found.origin, f"no module {name}"
    loader = _ExplainedAsserts(name, found.origin)
    spec = importlib.util.spec_from_file_location(name, found.origin, loader=loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module
