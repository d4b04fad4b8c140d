"""A run as a command of its own: stopped by the terminal, killed, and what is left of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LIMIT_S = 60
"""Far more than anything here takes on an idle machine; far less than targets sleep."""

# Has no `if __name__ == "__main__"`: a rank that imported it again would start ranks itself.
PROGRAM = """
import sys
from pathlib import Path
from megallama_launch.local import run_local

target, folder, grace_s, preload, *rest = sys.argv[1:]
args = (Path(folder), *map(int, rest)) if folder else ()
options = dict(grace_s=float(grace_s), preload=preload.split())
sys.exit(run_local(f"tests.launch.targets:{target}", 2, args, **options).exit_code)
"""

Start = Callable[..., subprocess.Popen]


def hear_ctrl_c() -> None:
    """Shells let what they start in the background ignore it: these tests, for one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts PROGRAM in a session of its own, so that every process it leaves can be found."""
    running: list[subprocess.Popen] = []

    def run(target: str, *args: int, grace_s: float = 30.0, preload: str = "", **options):
        program = tmp_path / "program.py"
        program.write_text(PROGRAM)
        command = [sys.executable, str(program), target, str(tmp_path), str(grace_s), preload]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": hear_ctrl_c}
        streams |= options
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        temporary = os.environ.get("TMPDIR", str(tmp_path))
        ours = {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": temporary}
        process = subprocess.Popen(
            [*command, *map(str, args)],
            cwd=ROOT,
            env=os.environ | ours,
            start_new_session=True,
            text=True,
            **streams,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def announced(folder: Path) -> list[int]:
    """Wait until both ranks have written their process ids."""
    files = [folder / f"pids-{rank}" for rank in range(2)]
    wait_until(lambda: all(file.exists() for file in files))
    return [int(pid) for file in files for pid in file.read_text().split()]


def wait_until(condition: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


def alive(session: int) -> list[str]:
    """Command lines of the processes of a session, zombies apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, sid = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("target", ["sleep_with_a_child", "hold_the_interpreter"])
def test_killed_parent_leaves_no_process(start: Start, tmp_path: Path, target: str):
    parent = start(target)
    pids = announced(tmp_path)
    assert len(alive(parent.pid)) >= 1 + len(pids)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not alive(parent.pid)), alive(parent.pid)


def test_ctrl_c_stops_all_without_a_traceback(start: Start, tmp_path: Path):
    parent = start("sleep_with_a_child")
    announced(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)  # what a terminal does
    out, err = parent.communicate(timeout=LIMIT_S)
    assert (parent.returncode, out, err) == (130, "", "stopped by SIGINT\n")
    assert wait_until(lambda: not alive(parent.pid)), alive(parent.pid)


def test_ctrl_c_while_the_forkserver_imports(start: Start, tmp_path: Path):
    marker = tmp_path / "importing"
    code = f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(2)\n"
    (tmp_path / "slow_to_import.py").write_text(code)
    parent = start("sleep_with_a_child", preload="slow_to_import")
    assert wait_until(marker.exists)
    os.killpg(parent.pid, signal.SIGINT)
    _, err = parent.communicate(timeout=LIMIT_S)
    assert (parent.returncode, err) == (130, "stopped by SIGINT\n")
    assert not list(tmp_path.glob("pids-*"))
    assert wait_until(lambda: not alive(parent.pid)), alive(parent.pid)


@pytest.mark.parametrize(
    ("saved", "code", "message"),
    [
        (4, 4, "stopped by SIGTERM, the state is saved\n"),
        (0, 0, ""),
        (1, 143, "stopped by SIGTERM\n"),
    ],
)
def test_ranks_may_save_on_sigterm(
    start: Start, tmp_path: Path, saved: int, code: int, message: str
):
    parent = start("save_on_sigterm", saved)
    announced(tmp_path)
    os.killpg(parent.pid, signal.SIGTERM)  # what `timeout` and batch systems do
    _, err = parent.communicate(timeout=LIMIT_S)
    assert (parent.returncode, err) == (code, message)


def test_ranks_that_do_not_stop_are_killed_after_the_grace(start: Start, tmp_path: Path):
    parent = start("ignore_sigterm", grace_s=0.5)
    announced(tmp_path)
    parent.terminate()
    parent.communicate(timeout=LIMIT_S)
    assert parent.returncode == 143
    assert wait_until(lambda: not alive(parent.pid)), alive(parent.pid)


def test_second_ctrl_c_does_not_wait(start: Start, tmp_path: Path):
    parent = start("ignore_sigterm")
    announced(tmp_path)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=LIMIT_S)
    assert parent.returncode == 130


def test_ignored_signals_stay_ignored(start: Start, tmp_path: Path):
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}  # as nohup does
    parent = start("save_on_sigterm", 0, **ignore)
    announced(tmp_path)
    parent.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert parent.poll() is None


def test_long_temporary_folder(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    Path(os.environ["TMPDIR"]).mkdir()
    parent = start("say_terminal")
    _, err = parent.communicate(timeout=LIMIT_S)
    assert (parent.returncode, err) == (0, "")


def test_ranks_write_to_the_parents_terminal(start: Start, tmp_path: Path):
    ours, theirs = os.openpty()
    parent = start("say_terminal", stdout=theirs, stderr=theirs)
    os.close(theirs)
    parent.wait(timeout=LIMIT_S)
    assert os.read(ours, 1000).decode().split() == ["True"] * 4
    os.close(ours)
