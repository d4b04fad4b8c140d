"""Trains a byte-level BPE; made `bpe512.json` from the standard library's sources.

`python -m megallama.data.train_tokenizer OUT.json [--source stdlib] [--vocab 512]`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megallama.config.errors import UserError
from megallama.data.documents import STDLIB, find_source, read_documents
from megallama.data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT

# Llama 3's: contractions, words, numbers of up to three digits, symbols, newlines, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of `vocab` ids: BOS, EOS, the 256 bytes, then merges (vocab >= 258)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BEGIN_OF_TEXT, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> int:
    """Train on one source and write OUT.json. Exits 2 where the user must fix something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", default=STDLIB, help="a file, a glob, or stdlib")
    parser.add_argument("--vocab", type=int, default=512, help="ids, at least 258")
    options = parser.parse_args()
    try:
        documents = read_documents(find_source(options.source, "--source"))
        tokenizer = train_tokenizer((document.text for document in documents), options.vocab)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    tokenizer.save(str(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
