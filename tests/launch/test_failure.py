"""Which of many failures is shown where there is no parent of ours: in srun's ranks, and alone."""

import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import pytest
from megallama_launch import claims, failure
from megallama_launch.local import run_local

from tests.ranks import ranks


def outputs_under_srun(world_size: int, *args: object) -> list[str]:
    """What each rank printed; no rank ran into the limit."""
    target = "tests.launch.targets:under_srun"
    outcome = run_local(target, world_size, args, capture=True, timeout_s=60)
    texts = [file.read_text() for file in outcome.outputs]
    shutil.rmtree(outcome.outputs[0].parent)
    assert outcome.exit_code == 1, outcome.text
    return texts


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("target", ["fail_in", "fail_after_leaving_the_group"])
def test_first_failure_is_shown_once_under_srun(target: str, victim: int):
    texts = outputs_under_srun(4, target, victim)
    place = f"tensor {victim % 2} · data {victim // 2}"
    headline = f"rank {victim} ({place}) failed: ValueError: the answer is 42\nTraceback"
    assert headline in texts[victim]
    assert "".join(texts).count("Traceback") == 1
    assert "".join(texts).count(" failed: ") == 1


@pytest.mark.parametrize("victims", [[0], [0, 1, 2, 3]])
def test_rank_0_speaks_where_no_store_exists_yet(victims: list[int]):
    texts = outputs_under_srun(4, "fail_before_meeting", victims)
    assert texts[0].startswith("rank 0 failed: ValueError: the answer is 42\nTraceback")
    assert texts[1:] == [""] * 3


@ranks(4)
def test_one_of_many_claims_in_a_store_wins():
    from torch import distributed as dist

    rank = dist.get_rank()
    address = "127.0.0.1", int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=30)
    server = dist.TCPStore(*address, is_master=True, timeout=limit) if rank == 0 else None
    store = dist.TCPStore(*address, is_master=False, timeout=limit, wait_for_workers=False)
    started = time.time()
    for _ in range(2):  # the second time as after a restart that kept the store
        wins: list = [None] * 4
        dist.barrier()
        dist.all_gather_object(wins, claims.claim_in_store(store, rank, since=started))
        assert sum(wins) == 1, wins
        assert not claims.claim_in_store(store, rank, since=started)
        time.sleep(0.01)
        dist.barrier()
        started = time.time()
    del server


def test_only_the_first_failure_stays_in_the_folder(tmp_path: Path):
    first, second = (
        claims.Failure(rank, 1, f"rank {rank} failed", "", symptom=False, time=0.0)
        for rank in range(2)
    )
    assert claims.claimed_in_folder(tmp_path) is None
    assert claims.claim_in_folder(tmp_path, first)
    assert not claims.claim_in_folder(tmp_path, second)
    assert claims.claimed_in_folder(tmp_path) == first


def test_a_store_that_raises_or_hangs_grants_nothing(monkeypatch: pytest.MonkeyPatch):
    def unreachable() -> bool:
        raise ConnectionError

    def hanging() -> bool:
        time.sleep(60)
        return True

    monkeypatch.setattr(claims, "ANSWER_S", 0.1)
    assert claims.granted(lambda: True)
    assert not claims.granted(lambda: False)
    assert not claims.granted(unreachable)
    assert not claims.granted(hanging)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", claims.STORE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(failure, "LINGER_S", 0.0)
    monkeypatch.setattr(failure.signal, "signal", lambda *_: None)  # pytest's own handlers stay


def raise_error(error: BaseException) -> None:
    raise error


@pytest.mark.usefixtures("alone")
def test_a_single_process_shows_its_own_failure(capfd: pytest.CaptureFixture[str]):
    assert failure.guard(raise_error, ValueError("no")) == 1
    err = capfd.readouterr().err
    assert err.startswith("rank 0 failed: ValueError: no\nTraceback (most recent call last):\n")
    assert "in guard" not in err


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("agent", "lingers"), [("", True), ("True", False)])
def test_the_host_of_the_store_lets_others_see_its_claim(
    monkeypatch: pytest.MonkeyPatch, agent: str, lingers: bool
):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    slept: list[float] = []
    monkeypatch.setattr(failure, "LINGER_S", 1.25)
    monkeypatch.setattr(failure.time, "sleep", slept.append)
    failure.guard(raise_error, ValueError("no"), claim=lambda: True)
    assert (1.25 in slept) == lingers


@pytest.mark.usefixtures("alone")
def test_no_words_about_what_another_rank_has_shown(capfd: pytest.CaptureFixture[str]):
    assert failure.guard(raise_error, ValueError("no"), claim=lambda: False) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("alone")
def test_coordinates_that_cannot_be_had_are_left_out(capfd: pytest.CaptureFixture[str]):
    def no_mesh() -> str:
        raise RuntimeError("no mesh yet")

    failure.guard(raise_error, ValueError("no"), coordinates=no_mesh)
    assert capfd.readouterr().err.startswith("rank 0 failed: ValueError: no\n")


@pytest.mark.usefixtures("alone")
def test_guard_returns_what_the_function_returns(capfd: pytest.CaptureFixture[str]):
    assert failure.guard(lambda: None) == 0
    assert failure.guard(lambda code: code, 3) == 3
    assert failure.guard(raise_error, KeyboardInterrupt()) == 130
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("alone")
def test_lost_connections_wait_for_their_cause(monkeypatch: pytest.MonkeyPatch):
    held_back: list[object] = []
    monkeypatch.setattr(failure, "_hold_back", held_back.append)
    for error, waits in [
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1"), 1),
        (RuntimeError("CUDA error: out of memory"), 0),
        (ConnectionResetError("Connection reset by peer"), 0),  # the user's own connection
    ]:
        held_back.clear()
        failure.guard(raise_error, error, claim=lambda: False)
        assert len(held_back) == waits, error
