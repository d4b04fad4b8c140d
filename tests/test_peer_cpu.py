"""benchmarks/peer_cpu.py without a peer: it is given folders that hold none, or a broken one."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/peer_cpu.py"


def peer_cpu(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240
    )


def test_a_folder_that_is_no_peer_is_named_in_one_line(tmp_path: Path) -> None:
    done = peer_cpu("--peer", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"--peer {tmp_path}: no checkout of picotron: no train.py\n"
    assert not done.stdout


@pytest.mark.slow
def test_a_peer_that_fails_is_reported_with_its_error_and_ours_is_still_timed(
    tmp_path: Path,
) -> None:
    (tmp_path / "picotron").mkdir()
    for name in ("train.py", "picotron/model.py", "picotron/process_group_manager.py"):
        (tmp_path / name).write_text("raise RuntimeError('wants a GPU')\n")
    done = peer_cpu("--peer", str(tmp_path), "--layouts", "1", "--steps", "1", "--runs", "2")
    assert done.returncode == 0, done.stderr
    _, _, processes, ours, peer, ratio, *_ = map(str.strip, done.stdout.splitlines()[-1].split("|"))
    assert (processes, peer) == ("1", "does not run: rank 0 failed: RuntimeError: wants a GPU")
    assert int(ours.replace(",", "")) > 0
    assert ratio == ""
