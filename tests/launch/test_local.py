"""Ranks of one machine: what they are given, and how each way to end is reported."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from megallama_launch.local import run_local
from megallama_launch.outcome import Outcome

TARGETS = "tests.launch.targets:"


def run(target: str, world_size: int, *args: object, **options) -> Outcome:
    outcome = run_local(TARGETS + target, world_size, args, capture=True, **options)
    shutil.rmtree(outcome.outputs[0].parent)
    return outcome


def test_ranks_get_the_environment_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FROM_PARENT", "set after the forkserver started")
    monkeypatch.delenv("HOME", raising=False)
    main = sys.modules["__main__"]
    assert run("write_environment", 4, tmp_path, env={"FROM_TEST": "yes"}).exit_code == 0
    assert sys.modules["__main__"] is main
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    for rank, environment in enumerate(seen):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "4"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert int(environment["MASTER_PORT"]) > 1023
        assert environment["MEGALLAMA_STORE"] == seen[0]["MEGALLAMA_STORE"]
        assert not Path(environment["MEGALLAMA_STORE"]).parent.exists(), "left behind"
        assert environment["FROM_TEST"] == "yes"
        assert environment["FROM_PARENT"] == "set after the forkserver started"
        assert environment["group"] == "True"
        assert "HOME" not in environment, "taken away after the forkserver started"


@pytest.mark.parametrize(("threads", "expected"), [(None, "1"), (3, "3")])
def test_threads_reach_torch(tmp_path: Path, threads: int | None, expected: str):
    many = os.cpu_count() or 1
    assert run("write_threads", 1, tmp_path, threads=threads or 1).exit_code == 0
    assert (tmp_path / "0").read_text() == expected
    assert run("write_environment", many, tmp_path, threads=threads).exit_code == 0
    assert json.loads((tmp_path / "0").read_text())["OMP_NUM_THREADS"] == expected


def test_captured_output_holds_both_streams():
    outcome = run_local(TARGETS + "say", 2, ("hello",), capture=True)
    texts = [file.read_text() for file in outcome.outputs]
    shutil.rmtree(outcome.outputs[0].parent)
    assert texts == [f"hello from {rank}\nand to stderr\n" for rank in range(2)]


def test_output_goes_where_the_parent_writes_now(capfd: pytest.CaptureFixture[str]):
    assert run_local(TARGETS + "say", 1, ("hello",)).exit_code == 0
    out, err = capfd.readouterr()
    assert (out, err) == ("hello from 0\n", "and to stderr\n")


def test_first_failure_is_printed_once(capfd: pytest.CaptureFixture[str]):
    outcome = run_local(TARGETS + "fail_in", 4, (2,))
    _, err = capfd.readouterr()
    headline = "rank 2 (tensor 0 · data 1) failed: ValueError: the answer is 42"
    assert (outcome.exit_code, outcome.failed_rank, outcome.message) == (1, 2, headline)
    assert err.startswith(f"{headline}\nTraceback (most recent call last)")
    assert err.count("the answer is 42") == 3  # the message, the line of code, the exception
    assert err.count("Traceback") == 1
    assert "Connection closed" not in err


def test_ranks_that_do_not_notice_a_failure_are_killed():
    started = time.monotonic()
    outcome = run("fail_while_others_sleep", 3, 1)
    assert (outcome.failed_rank, outcome.killed) == (1, (0, 2))
    assert time.monotonic() - started < 60


def test_cause_is_reported_although_its_symptoms_are_seen_before():
    outcome = run("fail_after_leaving_the_group", 4, 1)
    assert outcome.message == "rank 1 (tensor 1 · data 0) failed: ValueError: the answer is 42"


def test_one_of_many_equal_failures_is_reported(capfd: pytest.CaptureFixture[str]):
    assert run_local(TARGETS + "fail_everywhere", 4).exit_code == 1
    assert capfd.readouterr().err.count("Traceback") == 1


@pytest.mark.parametrize(
    ("signum", "message"),
    [
        (signal.SIGKILL, "rank 2 was killed by SIGKILL (out of memory? see dmesg)"),
        (signal.SIGSEGV, "rank 2 was killed by SIGSEGV"),
    ],
)
def test_rank_killed_by_a_signal(signum: signal.Signals, message: str):
    outcome = run("die_by", 4, signum, 2)
    assert (outcome.exit_code, outcome.failed_rank, outcome.text) == (1, 2, message)


def test_hung_ranks_show_where():
    started = time.monotonic()
    outcome = run("hang_in", 2, 1, timeout_s=3)
    assert outcome.exit_code == 1
    assert outcome.killed == (1,)
    assert outcome.message == "rank 1 did not finish in 3 s"
    assert "_a_place_to_hang" in outcome.details
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("codes", "code", "failed_rank", "message"),
    [
        ({}, 0, None, ""),
        ({1: 2}, 2, 1, "rank 1 ended with exit code 2"),
        ({0: 4, 1: 4}, 4, None, "stopped, the state is saved"),
    ],
)
def test_returned_exit_codes(codes: dict, code: int, failed_rank: int | None, message: str):
    outcome = run("exit_with", 2, codes)
    assert (outcome.exit_code, outcome.failed_rank, outcome.text) == (code, failed_rank, message)


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (7, 7), ("no such file", 1)])
def test_sys_exit(code: object, expected: int):
    outcome = run("sys_exit", 1, code)
    assert outcome.exit_code == expected
    assert (
        outcome.message
        == {
            0: "",
            1: "rank 0 failed: no such file",
            7: "rank 0 ended with exit code 7",
        }[expected]
    )


def test_deliberate_exceptions_carry_their_code_and_no_traceback():
    outcome = run("raise_by_name", 2, "diverged")
    assert (outcome.exit_code, outcome.details) == (3, "")
    assert outcome.message.endswith(" failed: DivergedError: loss is nan at step 7")
    outcome = run("raise_by_name", 2, "preempted")
    assert (outcome.exit_code, outcome.failed_rank) == (4, None)
    assert " stopped: " in outcome.message


def test_unknown_target_is_a_failure_like_any_other():
    outcome = run("no_such_function", 2)
    assert outcome.exit_code == 1
    assert "no_such_function" in outcome.message


def test_the_parent_does_not_import_torch():
    code = "import sys, megallama_launch.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
