import json
import logging
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

import numpy as np
import pytest

from megallama.data import shards, writer
from megallama.data.documents import Source, find_source, read_documents
from megallama.data.shards import Shard, cache_folder, open_shard
from megallama.data.tokenizer import Tokenizer
from tests.data.conftest import unprivileged, user_error

TEXTS = [f"document {n}\n" + "the same words again\n" * (n % 7) for n in range(300)]
BUILDS = "tokenizing"


@pytest.fixture
def source(write_jsonl: Callable[..., Path]) -> Source:
    return find_source(str(write_jsonl(TEXTS)), "data.sources.0.path")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def folder_in(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def digests(shard: Shard) -> tuple[str, str]:
    return shard.train.digest, shard.held_out.digest


def assert_sound(shard: Shard, tokenizer: Tokenizer, texts: list[str], share: float) -> None:
    """The shard holds BOS text EOS of each text in order, encoded one by one."""
    for split, kept in ((shard.train, False), (shard.held_out, True)):
        mine = [text for text in texts if writer.is_held_out(text, share) is kept]
        documents = [[tokenizer.bos, *tokenizer.encode([text])[0], tokenizer.eos] for text in mine]
        assert split.tokens.tolist() == [token for document in documents for token in document]
        assert split.ends.tolist() == np.cumsum([len(d) for d in documents]).tolist()
        assert split.text_bytes == sum(len(text.encode()) for text in mine)


def test_build_and_open(source: Source, cache: Path, bpe512: Tokenizer, caplog):
    caplog.set_level(logging.INFO)
    built = open_shard(source, bpe512, 0.1, cache)
    assert_sound(built, bpe512, TEXTS, 0.1)
    assert 5 < len(built.held_out.ends) < 80
    assert built.train.tokens.dtype == np.uint16
    assert built.train.ends.dtype == np.uint64
    again = open_shard(source, bpe512, 0.1, cache)
    assert digests(again) == digests(built)
    assert sum(BUILDS in message for message in caplog.messages) == 1
    folder = folder_in(cache)
    assert {path.name for path in cache.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_long_documents_are_whole(tmp_path: Path, cache: Path, bpe512: Tokenizer, monkeypatch):
    """A document that is encoded in pieces, over several batches, is still one document."""
    monkeypatch.setattr(writer, "PIECE", 50)
    monkeypatch.setattr(writer, "ENCODED_AT_ONCE", 200)
    texts = ["x = 1\n" * 100, "short", "y = 2\n" * 33]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    source = find_source(f"{tmp_path}/*.txt", "")
    assert_sound(open_shard(source, bpe512, 0.0, cache), bpe512, texts, 0.0)


def test_large_vocabularies_take_uint32(source: Source, cache: Path, bpe512: Tokenizer):
    shard = open_shard(source, with_vocab(bpe512, (1 << 16) + 1), 0.0, cache)
    assert shard.train.tokens.dtype == np.uint32
    assert_sound(shard, bpe512, TEXTS, 0.0)


def test_vocabulary_that_just_fits_uint16(source: Source, cache: Path, bpe512: Tokenizer):
    shard = open_shard(source, with_vocab(bpe512, 1 << 16), 0.0, cache)
    assert shard.train.tokens.dtype == np.uint16


def with_vocab(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    return Tokenizer("big", vocab, tokenizer.bos, tokenizer.eos, f"big{vocab}", tokenizer.model)


def test_each_source_tokenizer_and_share_has_its_own(
    source: Source, cache: Path, bpe512: Tokenizer, write_jsonl
):
    open_shard(source, bpe512, 0.0, cache)
    open_shard(source, bpe512, 0.1, cache)
    open_shard(source, with_vocab(bpe512, 600), 0.1, cache)
    file = write_jsonl([*TEXTS, "one more"])
    open_shard(find_source(str(file), ""), bpe512, 0.1, cache)
    assert len(list(cache.glob("*/manifest.json"))) == 4


def test_held_out_is_chosen_by_text():
    texts = [f"text {n}" for n in range(20_000)]
    kept = {share: {t for t in texts if writer.is_held_out(t, share)} for share in (0, 0.02, 0.5)}
    assert not kept[0]
    assert 300 < len(kept[0.02]) < 500
    assert 9_700 < len(kept[0.5]) < 10_300
    assert kept[0.02] < kept[0.5]


# Damage and crashes


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
        return counts

    monkeypatch.setattr(shards, "write_splits", slowly)
    shard = open_shard(source, bpe512, 0.1, cache)
    assert_sound(shard, bpe512, TEXTS, 0.1)
    assert folder_in(cache).name == folder_in(other).name


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
    assert sum(BUILDS in errors for _, errors in results) == 1


def test_the_next_in_line_takes_over_from_a_killed_builder(larger, tmp_path: Path):
    first, second = start_prepare(larger), start_prepare(larger)
    go(first)
    wait_for(lambda: list((tmp_path / "cache").glob("*.tmp/train.tokens")))
    go(second)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    _, errors = finish(second)
    assert BUILDS in errors


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


# The cache folder


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MEGALLAMA_CACHE", raising=False)
    assert cache_folder(None) == tmp_path / ".cache/megallama"
    assert cache_folder("~/here") == tmp_path / "here"
    monkeypatch.setenv("MEGALLAMA_CACHE", "/there")
    assert cache_folder(None) == Path("/there")
    assert cache_folder("here") == Path("here")


def test_no_home(monkeypatch: pytest.MonkeyPatch):
    with user_error("data.cache", "'~no such user/cache'"):
        cache_folder("~no such user/cache")


def test_cache_that_is_a_file(source: Source, tmp_path: Path, bpe512: Tokenizer):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with user_error("data.cache", str(cache)):
            open_shard(source, bpe512, 0.1, cache)


def test_shard_that_is_a_file(source: Source, cache: Path, bpe512: Tokenizer):
    open_shard(source, bpe512, 0.1, cache)
    folder = folder_in(cache)
    shutil.rmtree(folder)
    folder.write_text("")
    with user_error("data.cache", str(cache)):
        open_shard(source, bpe512, 0.1, cache)


def test_unwritable_cache(source: Source, open_folder: Path, bpe512: Tokenizer):
    file = open_folder / "a.jsonl"
    shutil.copy(source.files[0], file)
    source = find_source(str(file), "")
    cache = open_folder / "cache"
    cache.mkdir(mode=0o555)
    with unprivileged(), user_error("data.cache", str(cache), "Permission denied"):
        open_shard(source, bpe512, 0.1, cache)


def test_read_only_cache_is_enough_once_it_is_filled(
    source: Source, open_folder: Path, bpe512: Tokenizer
):
    file = open_folder / "a.jsonl"
    shutil.copy(source.files[0], file)
    source = find_source(str(file), "")
    cache = open_folder / "cache"
    built = digests(open_shard(source, bpe512, 0.1, cache))
    cache.chmod(0o555)
    with unprivileged():
        assert digests(open_shard(source, bpe512, 0.1, cache)) == built
    cache.chmod(0o755)


def test_full_disk(source: Source, cache: Path, bpe512: Tokenizer, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with user_error("data.cache", str(cache), "No space left on device"):
        open_shard(source, bpe512, 0.1, cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]
