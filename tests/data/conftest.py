import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megallama.config.errors import UserError
from megallama.config.schema import DataConfig, SourceConfig
from megallama.data.documents import Source, find_source
from megallama.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.shard_checks import TEXTS

NOBODY = 65534


@pytest.fixture(scope="session")
def bpe512() -> Tokenizer:
    return load_tokenizer("bpe512")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(texts: list[str], name: str = "docs.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    return write


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., DataConfig]:
    """A DataConfig for paths, or (path, weight) pairs, with a cache of its own."""

    def make(*paths: object, **fields: Any) -> DataConfig:
        pairs = [path if isinstance(path, tuple) else (path, 1.0) for path in paths]
        sources = [SourceConfig(path=str(path), weight=weight) for path, weight in pairs]
        defaults: dict[str, Any] = {
            "cache": str(tmp_path / "cache"),
            "held_out": 0.0,
            "seq_len": 16,
        }
        return DataConfig(sources=sources, **(defaults | fields))

    return make


@pytest.fixture
def source(write_jsonl: Callable[..., Path]) -> Source:
    return find_source(str(write_jsonl(TEXTS)), "data.sources.0.path")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@contextmanager
def user_error(key: str, *parts: str) -> Iterator[None]:
    """Expect a UserError with one problem: its key, and parts of its message."""
    with pytest.raises(UserError) as caught:
        yield
    (problem,) = caught.value.problems
    assert problem.key == key
    for part in parts:
        assert part in problem.message


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read and write everything; be somebody else for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
