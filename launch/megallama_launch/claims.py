"""Who failed first: exactly one rank may say yes, however many fail, on however many nodes."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

STORE = "MEGALLAMA_STORE"
"""Environment variable: path of the FileStore, where `run_local` started the ranks."""

KEY = "megallama/first_failure"
REACH_S = 2.0
"""How long a connection to the store may take before the store counts as gone, in seconds."""

ANSWER_S = 30.0
"""How long a whole claim may take, in seconds: a rank may have yet to import torch for it."""


class Store(Protocol):
    """The part of torch.distributed.Store that a claim needs."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are set."""

    def get(self, key: str, /) -> bytes:
        """The value of a key that is set."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set `desired` where the value is `expected` ("" for none); the value afterwards."""


@dataclass(frozen=True)
class Failure:
    """How a rank failed, in words for the user."""

    rank: int
    exit_code: int
    message: str
    """One paragraph: who, where in the layout, and what."""
    traceback: str
    """Empty where the exception was raised for the user and not by a fault in the code."""
    symptom: bool
    """A lost connection: some other rank probably failed before."""
    time: float
    """When it was claimed: time.monotonic(), in seconds, comparable on one machine."""

    @property
    def text(self) -> str:
        """What is shown: the message, then the traceback."""
        return f"{self.message}\n{self.traceback}"


def claim_in_folder(folder: Path, failure: Failure) -> bool:
    """Leave `failure` as the first one; False where another rank has.

    The file appears complete or not at all, so it holds whoever is killed while writing.
    """
    draft = folder / f"failure-{failure.rank}"
    draft.write_text(json.dumps(asdict(failure)))
    try:
        (folder / "first_failure").hardlink_to(draft)
    except FileExistsError:
        return False
    return True


def claimed_in_folder(folder: Path) -> Failure | None:
    """The failure that some rank left in the folder, if any did."""
    try:
        return Failure(**json.loads((folder / "first_failure").read_text()))
    except FileNotFoundError:
        return None


def claim_in_store(store: Store, rank: int, since: float) -> bool:
    """Take KEY for `rank`; False where another rank took it after `since` (unix seconds).

    A claim that is older than this rank belongs to an attempt before the last restart: torchrun
    keeps its store over restarts, and the restart count differs between nodes.
    """
    old = store.get(KEY).decode() if store.check([KEY]) else ""
    if old and float(old.split()[0]) >= since:
        return False
    mine = f"{time.time()} {rank}"
    return store.compare_set(KEY, old, mine).decode() == mine


def claim_from_environment(rank: int, since: float) -> bool:
    """Claim in the TCPStore at MASTER_ADDR:MASTER_PORT.

    It works from the first line of a rank on, before any rendezvous: torchrun's store is there
    already. Under srun rank 0 hosts the store itself, and speaks while there is none.
    """
    if "MASTER_ADDR" not in os.environ:
        return True
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except OSError:
        return hosts_store(rank)

    from torch.distributed import TCPStore

    limit = timedelta(seconds=REACH_S)
    store = TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    return claim_in_store(store, rank, since)


def hosts_store(rank: int) -> bool:
    """Whether the store lives in this process and ends with it."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def granted(claim: Callable[[], bool]) -> bool:
    """Ask `claim`; a store that raises or does not answer in ANSWER_S means "not first"."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            answers.append(claim())
        except Exception:
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return bool(answers and answers[0])
