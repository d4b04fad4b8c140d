"""Mistakes, made through the real command: each is one message with key, place and way out, exit 2,
before anything is started.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megallama import cli
from tests.cli.mistakes import CASES, YAML, Case, variables
from tests.config.sample import HERE, place


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started, which must stay empty; `right` uses it as well."""
    started: list[str] = []

    def start(what: str) -> Callable[..., None]:
        def note(*_: object, **__: object) -> None:
            started.append(what)
            pytest.fail(f"{what} was started", pytrace=False)

        return note

    monkeypatch.setattr("megallama_launch.local.run_local", start("run_local"))
    monkeypatch.setattr("megallama_launch.forkserver.start_forkserver", start("forkserver"))
    monkeypatch.setattr("torch.distributed.init_process_group", start("process group"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return started


def said(capfd: pytest.CaptureFixture[str], arguments: Sequence[str], *, problems: int = 1) -> str:
    """The message of a command that must refuse; asserts that there is one, and no more."""
    capfd.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as exit_:  # argparse's own
        code = exit_.code  # type: ignore[assignment]
    printed = capfd.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    assert "Traceback" not in printed.err
    header = re.match(r".*: (\d+) problems?\n", printed.err)
    if header:
        assert int(header[1]) == problems, printed.err
    return printed.err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_one_message_before_anything_starts(
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    nothing_starts: list[str],
):
    assert not case.old or YAML.count(case.old) == 1
    config = tmp_path / "my.yaml"
    text = YAML.replace(case.old, case.new) if case.old else YAML
    config.write_text(text.replace(HERE, ""))
    case.around(tmp_path, monkeypatch)
    given = [override.replace("@", str(tmp_path)) for override in case.given]
    message = said(capfd, ["train", str(config), f"run={tmp_path}/run", *given])
    for part in case.says:
        assert part in message, message
    if HERE in text:
        assert f"{config}:{place(text)}: " in message, message
    if case.key:
        assert re.search(rf"(^|[\s:]){re.escape(case.key)}: ", message), message
    assert nothing_starts == []


def test_the_table_is_long_enough():
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)


def test_exponents_are_numbers(tmp_path: Path, nothing_starts: list[str]):
    """PyYAML would read 3e-4 as text. The run itself is right, and would start."""
    config = tmp_path / "my.yaml"
    config.write_text(YAML.replace("3e-3", "3e-4"))
    data = tmp_path / "data.txt"
    data.write_text("Some text. " * 99)
    with pytest.raises(pytest.fail.Exception, match="run_local was started"):
        cli.main(["train", str(config), f"run={tmp_path}/run", f"data.sources=[{{path: {data}}}]"])
    assert nothing_starts == ["run_local"]


def test_all_mistakes_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = tmp_path / "my.yaml"
    config.write_text(YAML.replace("steps: 6", "stepz: 6").replace("lr: 3e-3", "lr: fast"))
    text = said(capfd, ["train", str(config), "data.seq_len=0"], problems=4)
    for key in ("train.stepz", "train.steps", "optimizer.lr", "data.seq_len"):
        assert f" {key}: " in text


def test_other_ranks_keep_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    config = tmp_path / "my.yaml"
    config.write_text(YAML)
    variables(RANK="1", LOCAL_RANK="1", WORLD_SIZE="3")(tmp_path, monkeypatch)
    for wrong in ("layout.tensor=2", "train.stepz=3"):
        assert said(capfd, ["train", str(config), f"run={tmp_path}/run", wrong]) == ""


def test_other_ranks_let_the_speaker_end_first_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Torchrun ends all ranks when one has ended; the message must be out by then."""
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    for rank, waits in (("1", [cli.SPEAKER_S]), ("0", [])):
        slept.clear()
        variables(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", TORCHELASTIC_RUN_ID="x")(
            tmp_path, monkeypatch
        )
        said(capfd, ["train", f"{tmp_path}/none.yaml"])
        assert slept == waits


COMMANDS = {
    "no config": (["train", "none.yaml"], ("none.yaml: no such file; ", "shipped runs are")),
    "a near name": (["train", "quickstrat"], ("did you mean quickstart?",)),
    "verify without a config": (["verify", "none.yaml"], ("none.yaml: no such file; ",)),
    "verify of no steps": (
        ["verify", "quickstart", "--steps", "0"],
        ("--steps", "0", "at least 1"),
    ),
    "verify of -1 steps": (["verify", "quickstart", "--steps", "-1"], ("--steps", "at least 1")),
    "verify in no processes": (
        ["verify", "quickstart", "--processes", "0"],
        ("--processes", "at least 1"),
    ),
    "verify in words": (["verify", "quickstart", "--steps", "many"], ("--steps", "'many'")),
    "verify in float16": (["verify", "quickstart", "--dtype", "float16"], ("--dtype", "float32")),
    "no command": ([], ("COMMAND",)),
    "unknown command": (["trian"], ("'trian'", "train")),
    "train nothing": (["train"], ("CONFIG",)),
    "no such key": (["config", "explain", "layout.tensr"], ("layout.tensr", "tensor")),
    "config for a wrong world": (
        ["config", "show", "quickstart", "--world", "3"],
        ("layout", "3 processes: start"),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_is_one_message(
    name: str, capfd: pytest.CaptureFixture[str], nothing_starts: list[str]
):
    arguments, parts = COMMANDS[name]
    text = said(capfd, arguments)
    for part in parts:
        assert part in text, text
    assert nothing_starts == []


@pytest.mark.parametrize("wrong", ["layout.tensor=3", "data.tokenizer=/none.json"])
def test_the_installed_command_says_the_same(tmp_path: Path, wrong: str):
    config = tmp_path / "my.yaml"
    config.write_text(YAML)
    done = subprocess.run(
        [sys.executable, "-m", "megallama", "train", str(config), f"run={tmp_path}/run", wrong],
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert wrong.partition("=")[0] in done.stderr
    assert "Traceback" not in done.stderr
