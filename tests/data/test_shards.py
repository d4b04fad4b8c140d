import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megallama.data import writer
from megallama.data.documents import Source, find_source
from megallama.data.shards import cache_folder, open_shard
from megallama.data.tokenizer import Tokenizer
from tests.data.conftest import unprivileged, user_error
from tests.data.shard_checks import TEXTS, assert_sound, digests, folder_in


def test_build_and_open(source: Source, cache: Path, bpe512: Tokenizer, caplog):
    caplog.set_level(logging.INFO)
    built = open_shard(source, bpe512, 0.1, cache)
    assert_sound(built, bpe512, TEXTS, 0.1)
    assert 5 < len(built.held_out.ends) < 80
    assert built.train.tokens.dtype == np.uint16
    assert built.train.ends.dtype == np.uint64
    again = open_shard(source, bpe512, 0.1, cache)
    assert digests(again) == digests(built)
    assert sum("tokenizing" in message for message in caplog.messages) == 1
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
