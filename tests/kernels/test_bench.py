"""kernels/bench: the command runs all its paths without a GPU, and says what it ran."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


def bench(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_dry_run_times_and_checks_every_implementation(tmp_path: Path) -> None:
    out = tmp_path / "rope"
    printed = bench("run.py", "--output", str(out), "--ops", "rope")
    assert "DRY RUN" in printed
    assert "DRY RUN" in (out / "results.md").read_text()
    (found,) = json.loads((out / "results.json").read_text())
    assert found["dry_run"]
    expected = {"ours", "eager", "compile"} | ({"liger"} if find_spec("liger_kernel") else set())
    rows = found["rows"]
    assert {row["what"] for row in rows} == {"forward", "backward"}
    for what in ("forward", "backward"):
        assert {row["implementation"] for row in rows if row["what"] == what} == expected
    for row in rows:
        assert not row["problem"]
        numbers = [row[name] for name in ("ms", "host_us", "gb_s", "of_floor")]
        assert all(math.isfinite(x) and x > 0 for x in numbers)
        assert 0 <= row["difference"] < 2e-2


@pytest.mark.slow
def test_parts_are_put_together_and_later_rows_win(tmp_path: Path) -> None:
    first, second, whole = (tmp_path / name for name in ("1", "2", "whole"))
    ops = ("--ops", "grad_norm", "adamw")
    bench("run.py", "--output", str(first), *ops, "--part", "1/2")
    bench("run.py", "--output", str(second), *ops, "--part", "2/2")
    bench("run.py", "--output", str(second), "--ops", "adamw")
    bench("merge.py", "--output", str(whole), str(first), str(second))
    benches = json.loads((whole / "results.json").read_text())
    ops_of = [{row["op"] for row in one["rows"]} for one in benches]
    assert ops_of == [{"grad_norm"}, {"adamw"}, {"adamw"}]
    assert not [row for one in benches for row in one["rows"] if row["problem"]]
    lines = (whole / "results.md").read_text().splitlines()
    assert sum(line.startswith("| adamw | whole | 1b | ours |") for line in lines) == 1
