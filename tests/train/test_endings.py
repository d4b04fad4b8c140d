"""How a run ends when it does not reach its last step: exit code, message, and what is saved."""

import os
import signal
from pathlib import Path

import pytest

from tests.train.runs import (
    curve,
    meanwhile,
    ranks_of,
    saved_steps,
    train,
    train_through,
    wait_for,
)

PIPELINE = "layout.pipeline=2"


def test_sigterm_saves_the_step_and_loses_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run, steps = tmp_path / "run", "train.steps=30"

    def stop() -> None:
        wait_for(run, 3)
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(stop):
        assert train(run, PIPELINE, steps) == 4
    said = capfd.readouterr().err
    done = len(curve(run))
    assert 3 <= done < 30
    assert saved_steps(run) == [done]
    assert said.count(f"asked to stop; step {done} is saved and the run can go on") == 1
    assert "Traceback" not in said
    assert train(run, PIPELINE, steps) == 0
    assert train(tmp_path / "whole", PIPELINE, steps) == 0
    assert curve(run) == curve(tmp_path / "whole")


def test_a_killed_rank_is_named_and_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run, more = tmp_path / "run", ("train.steps=30", "checkpoint.every=3")

    def kill() -> None:
        wait_for(run, 4)
        os.kill(ranks_of(os.getpid())[1], signal.SIGKILL)

    with meanwhile(kill):
        assert train(run, PIPELINE, *more) == 1
    assert capfd.readouterr().err.count("was killed by SIGKILL") == 1
    assert train(run, PIPELINE, *more) == 0
    assert train(tmp_path / "whole", PIPELINE, "train.steps=30") == 0
    whole = curve(tmp_path / "whole")
    assert sorted(set(curve(run))) == whole  # what was done twice came out the same


def failure_of(capfd: pytest.CaptureFixture[str]) -> str:
    """What was printed; one failure of one rank in it."""
    text = capfd.readouterr().err
    assert text.count(" failed: ") == 1, text
    return text


def test_nan_ends_the_run_as_diverged(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert train_through("tests.train.targets:poison_a_weight", tmp_path / "run", PIPELINE) == 3
    text = failure_of(capfd)
    assert "Diverged: loss nan, grad norm nan: training has diverged" in text
    assert "Traceback" not in text
    assert saved_steps(tmp_path / "run") == []


def test_an_absurd_rate_ends_the_run_as_diverged(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    rate = ("optimizer.lr=1e300", "checkpoint.every=1")
    assert train(tmp_path / "run", "layout.data_shard=2", *rate) == 3
    text = failure_of(capfd)
    assert "training has diverged" in text
    assert "Traceback" not in text
    assert saved_steps(tmp_path / "run") == [step for step, _, _ in curve(tmp_path / "run")][-3:]


def test_a_ranks_error_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert train_through("tests.train.targets:fail_at_a_step", tmp_path / "run", PIPELINE) == 1
    text = failure_of(capfd)
    assert "rank 1 (pipeline 1) failed: ValueError: the shelf is empty\nTraceback" in text
    assert text.count("Traceback") == 1
    assert 'raise ValueError("the shelf is empty")' in text
    assert len(curve(tmp_path / "run")) == 2
