"""What the tests of shards share."""

from pathlib import Path

import numpy as np

from megallama.data import writer
from megallama.data.shards import Shard
from megallama.data.tokenizer import Tokenizer

TEXTS = [f"document № {n}\n" + "the same words again\n" * (n % 7) for n in range(300)]


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
