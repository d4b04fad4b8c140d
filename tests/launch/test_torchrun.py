"""Under the real torchrun: one report of the first failure in everything that is printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each rank imports torch by itself

ROOT = Path(__file__).parents[2]


def torchrun(*args: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    return subprocess.run(
        [sys.executable, *run, f"--max-restarts={restarts}", "-m", "tests.launch.targets"]
        + [str(arg) for arg in args],
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
        check=False,
    )


def root_cause(output: str) -> str:
    return output.partition("Root Cause (first observed failure):")[2]


@pytest.mark.parametrize(
    "target", ["fail_in", "fail_after_leaving_the_group", "fail_one_before_the_others"]
)
def test_summary_names_the_first_failure_once(target: str):
    done = torchrun(target, 2)
    headline = "rank 2 (tensor 0 · data 1) failed: ValueError: the answer is 42"
    assert done.returncode == 1
    assert done.stdout.count(headline) == 1, done.stdout
    assert headline in root_cause(done.stdout), done.stdout
    assert done.stdout.count("ValueError: the answer is 42\n") == 2  # headline and traceback
    assert "Connection closed" not in done.stdout


def test_equal_failures_before_any_meeting_are_one_report():
    done = torchrun("fail_everywhere")
    assert done.stdout.count("failed: ValueError: the answer is 42") == 1, done.stdout
    assert "failed: ValueError: the answer is 42" in root_cause(done.stdout), done.stdout


def test_killed_rank_is_not_hidden_by_its_peers():
    done = torchrun("die_by_sigkill", 1)
    assert "Signal 9 (SIGKILL) received by PID" in root_cause(done.stdout), done.stdout
    assert "Connection closed" not in done.stdout


def test_each_restart_shows_its_own_failure():
    done = torchrun("fail_everywhere", restarts=1)
    assert done.stdout.count("failed: ValueError: the answer is 42") == 2, done.stdout
