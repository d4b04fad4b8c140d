"""A run killed ten times with SIGKILL, at random moments: its curve is the uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallama.checkpoint.store import newest_valid
from tests.train.runs import FOUR, curve, ranks_of, wait_for, write_yaml

STEPS, EVERY, KILLS = 40, 3, 10
RUN = (*FOUR, f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=2")


def start(run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megallama", "train", write_yaml(run.parent), f"run={run}", *RUN],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the run to reach its last step; what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill(process: subprocess.Popen[str], whom: str, dice: random.Random) -> None:
    """The command, one of its ranks, or all of them at once; then wait until none is left."""
    ranks = ranks_of(process.pid)
    victims = {"command": [process.pid], "rank": ranks, "all": [process.pid, *ranks]}[whom]
    if whom == "rank":
        victims = [dice.choice(ranks)] if ranks else [process.pid]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=60)
    until = time.monotonic() + 30
    while time.monotonic() < until and any(Path(f"/proc/{rank}").exists() for rank in ranks):
        time.sleep(0.02)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_leave_the_curve_as_it_is(tmp_path: Path):
    finish(start(tmp_path / "whole"))
    whole = curve(tmp_path / "whole")
    assert len(whole) == STEPS

    run, dice = tmp_path / "run", random.Random(3)
    checkpoints = run / "checkpoints"
    reached = 0
    for number in range(KILLS):
        process = start(run)
        if number == 4:  # while it starts
            time.sleep(dice.uniform(0.5, 4))
        else:
            wait_for(run, min(reached + dice.randint(1, 5), STEPS - 2))
            time.sleep(dice.uniform(0, 0.4))
        assert process.poll() is None, process.communicate()
        kill(process, dice.choice(["command", "rank", "all"]), dice)
        manifest, passed_over = newest_valid(checkpoints)
        assert passed_over == []
        before, reached = reached, manifest.step if manifest else 0
        assert reached >= before
        written = curve(run)
        assert set(written) <= set(whole)
        assert written[-1][0] - reached <= EVERY  # no more is done again than since the last save

    assert "passed over" not in finish(start(run))
    written = curve(run)
    assert sorted(set(written)) == whole
    assert written[-1] == whole[-1]
    assert newest_valid(checkpoints)[0].step == STEPS
    assert not list(checkpoints.glob(".*"))
