"""The same YAML under torchrun and under srun: the same curve as alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import curve, train, write_yaml

pytestmark = pytest.mark.slow  # each rank imports torch by itself

CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_", "MEGALLAMA_STORE"))
}
ENV = CLEAN | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
LAYOUT = ("layout.pipeline=2", "train.steps=4")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float]]:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(run, *LAYOUT) == 0
    return curve(run)


def command(run: Path, *overrides: str) -> list[str]:
    return ["-m", "megallama", "train", write_yaml(run.parent), f"run={run}", *overrides]


def environment(**more: str) -> dict[str, str]:
    return ENV | {"MEGALLAMA_CACHE": os.environ["MEGALLAMA_CACHE"]} | more


def torchrun(run: Path, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *start, *command(run, *overrides)],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
        check=False,
    )


def srun(run: Path, *overrides: str) -> list[tuple[int, str]]:
    """Exit code and output of each of two tasks, started with what SLURM sets."""
    tasks = [
        subprocess.Popen(
            [sys.executable, *command(run, *overrides)],
            env=environment(
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank),
                SLURM_NTASKS="2",
                SLURM_STEP_NODELIST="node1",
                SLURM_JOB_ID=str(os.getpid()),
                MASTER_ADDR="127.0.0.1",
            ),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [task.communicate(timeout=200)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [(task.returncode, output) for task, output in zip(tasks, outputs, strict=True)]


def test_torchrun_gives_the_same_curve(tmp_path: Path, alone: list[tuple[int, float, float]]):
    done = torchrun(tmp_path / "run", *LAYOUT)
    assert done.returncode == 0, done.stdout
    assert curve(tmp_path / "run") == alone


def test_srun_gives_the_same_curve(tmp_path: Path, alone: list[tuple[int, float, float]]):
    ended = srun(tmp_path / "run", *LAYOUT)
    assert [code for code, _ in ended] == [0, 0], ended
    assert curve(tmp_path / "run") == alone


def test_torchrun_shows_a_users_error_once(tmp_path: Path):
    done = torchrun(tmp_path / "run", "layout.pipeline=1", "layout.data_shard=4")
    assert done.returncode == 1  # torchrun's own
    assert done.stdout.count("data_shard 4 = 4 ranks, not 2 processes: start 4") == 1, done.stdout
    assert "UserError" not in done.stdout, done.stdout  # the traceback is torchrun's own


def test_srun_shows_a_users_error_once(tmp_path: Path):
    ended = srun(tmp_path / "run", "layout.pipeline=1", "layout.data_shard=4")
    assert [code for code, _ in ended] == [2, 2], ended
    assert "".join(output for _, output in ended).count("start 4") == 1, ended
