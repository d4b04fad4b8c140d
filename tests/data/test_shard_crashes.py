import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megallama.data import shards, writer
from megallama.data.documents import Source, read_documents
from megallama.data.shards import open_shard
from megallama.data.tokenizer import Tokenizer
from tests.data.shard_checks import TEXTS, assert_sound, digests, folder_in


def truncate(folder: Path) -> None:
    file = folder / "train.tokens"
    os.truncate(file, file.stat().st_size - 2)


def grow_held_out_ends(folder: Path) -> None:
    with (folder / "held_out.ends").open("ab") as file:
        file.write(bytes(8))


def edit_manifest(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


DAMAGES = {
    "truncated": truncate,
    "grown": grow_held_out_ends,
    "file gone": lambda folder: (folder / "train.ends").unlink(),
    "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
    "manifest empty": lambda folder: (folder / "manifest.json").write_text(""),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff"),
    "no splits": edit_manifest(splits={}),
    "splits null": edit_manifest(splits=None),
    "no such dtype": edit_manifest(dtype="uint17"),
    "other dtype": edit_manifest(dtype="uint32"),
    "all gone": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_shard_is_built_again(
    source: Source, cache: Path, bpe512: Tokenizer, damage: Callable[[Path], object], caplog
):
    expected = digests(open_shard(source, bpe512, 0.1, cache))
    damage(folder_in(cache))
    shard = open_shard(source, bpe512, 0.1, cache)
    assert digests(shard) == expected
    assert_sound(shard, bpe512, TEXTS, 0.1)
    assert "damaged" in caplog.text


def test_what_a_dead_process_left_is_removed(source: Source, cache: Path, bpe512: Tokenizer):
    expected = digests(open_shard(source, bpe512, 0.1, cache))
    folder = folder_in(cache)
    left = cache / f"{folder.name}.{socket.gethostname()}.tmp"
    folder.rename(left)
    (left / "stray").write_text("x")
    assert digests(open_shard(source, bpe512, 0.1, cache)) == expected
    assert not left.exists()
    assert not (folder / "stray").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_build_leaves_nothing(
    source: Source, cache: Path, bpe512: Tokenizer, monkeypatch, error: type[BaseException]
):
    def interrupt(*_: object) -> Iterator[object]:
        yield next(read_documents(source))
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(shards, "read_documents", interrupt)
        open_shard(source, bpe512, 0.1, cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert_sound(open_shard(source, bpe512, 0.1, cache), bpe512, TEXTS, 0.1)


def test_another_machine_was_faster(source: Source, cache: Path, bpe512: Tokenizer, monkeypatch):
    """Without a common lock, the shard that is already there stays: others may have it mapped."""
    other = cache.with_name("other")
    open_shard(source, bpe512, 0.1, other)
    write_splits = writer.write_splits

    def slowly(*arguments: object) -> dict[str, dict[str, int | str]]:
        counts = write_splits(*arguments)  # type: ignore[arg-type]
        shutil.copytree(folder_in(other), cache / folder_in(other).name)
        (cache / folder_in(other).name / "theirs").touch()
        return counts

    monkeypatch.setattr(shards, "write_splits", slowly)
    shard = open_shard(source, bpe512, 0.1, cache)
    assert_sound(shard, bpe512, TEXTS, 0.1)
    assert (folder_in(cache) / "theirs").exists()


PREPARE = """
import logging, sys
from megallama.config.schema import DataConfig
from megallama.data.dataset import prepare
logging.basicConfig(level=logging.INFO)
config = DataConfig.model_validate_json(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
data = prepare(config, 1, 512)
print(data.fingerprint, data.train[12345].tokens.sum(), data.held_out[5].tokens.sum())
"""


def start_prepare(config) -> subprocess.Popen[str]:
    """A process that is about to call prepare, once it reads a line."""
    command = [sys.executable, "-c", PREPARE, config.model_dump_json()]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out, errors


@pytest.fixture
def larger(write_jsonl, config_of):
    """Takes long enough to build that one can be in its way."""
    line = "def f(x):\n    return x + 1\n"
    file = write_jsonl([f"# {n}\n{line * 40}" for n in range(800)], "large.jsonl")
    return config_of(file, held_out=0.1)


def test_processes_that_start_at_once_agree(larger):
    processes = [start_prepare(larger) for _ in range(4)]
    for process in processes:
        go(process)
    results = [finish(process) for process in processes]
    assert len({out for out, _ in results}) == 1
    assert sum("tokenizing" in errors for _, errors in results) == 1


def test_the_next_in_line_takes_over_from_a_killed_builder(larger, tmp_path: Path):
    first, second = start_prepare(larger), start_prepare(larger)
    go(first)
    wait_for(lambda: list((tmp_path / "cache").glob("*.tmp/train.tokens")))
    go(second)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    _, errors = finish(second)
    assert "tokenizing" in errors


def wait_for(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_any_moment(larger, tmp_path: Path):
    cache = tmp_path / "cache"
    process = start_prepare(larger)
    started = time.monotonic()
    go(process)
    expected, _ = finish(process)
    duration = time.monotonic() - started
    cut_short = 0
    for _ in range(12):
        shutil.rmtree(cache)
        process = start_prepare(larger)
        go(process)
        time.sleep(random.uniform(0, duration))
        process.kill()
        process.communicate()
        cut_short += any(cache.glob("*.tmp"))
        for folder in cache.glob("*/"):
            assert folder.suffix == ".tmp" or (folder / "manifest.json").exists()
        process = start_prepare(larger)
        go(process)
        assert finish(process)[0] == expected
        assert not list(cache.glob("*.tmp"))
    assert cut_short > 0
