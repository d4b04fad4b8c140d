"""Text to token ids and back, by a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import xxhash

from megallama.config.errors import UserError

SHIPPED = "bpe512"
KEY = "data.tokenizer"

BEGIN_OF_TEXT, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>"
# The first pair that a vocabulary holds marks its documents' ends: Llama 3's names, then others'.
BORDERS = (
    (BEGIN_OF_TEXT, END_OF_TEXT),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>", "<|endoftext|>"),
)

# Inside a document, a single newline between two visible characters: no BPE pre-tokenizer of the
# Llama and GPT families joins what stands on its two sides.
_CUT = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary of `vocab` ids; `digest` hashes its file."""

    name: str
    vocab: int
    bos: int
    eos: int
    digest: str
    model: tokenizers.Tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS; a special token's name in a text is plain text."""
        batch = self.model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens appear by name."""
        return self.model.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(name: str) -> Tokenizer:
    """Load `bpe512` or the path of a `tokenizer.json`.

    Raises UserError naming data.tokenizer: no such file, a folder, not a tokenizer, no BOS or EOS.
    """
    file = Path(__file__).with_name(f"{SHIPPED}.json") if name == SHIPPED else Path(name)
    try:
        data = file.expanduser().read_bytes()
    except IsADirectoryError as error:
        raise UserError.one(KEY, f"{name!r} is a folder: name {name}/tokenizer.json") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError.one(
            KEY, f"{name!r} cannot be read ({error}): give {SHIPPED!r} or a tokenizer.json"
        ) from error
    try:
        model = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        raise UserError.one(
            KEY, f"{name!r} is not a Hugging Face tokenizer.json ({error}): give one"
        ) from error
    # A file saved for inference may cut or pad what it encodes.
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    ids = model.get_vocab(with_added_tokens=True)
    bos, eos = _borders(ids, name)
    vocab = max(ids.values()) + 1
    return Tokenizer(name, vocab, bos, eos, xxhash.xxh3_128_hexdigest(data), model)


def cut_pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text every `size` characters or somewhat later, where the cut changes no token.

    A text of gigabytes is thus encoded in bounded memory and on all cores. Text with no place to
    cut stays whole.
    """
    start = 0
    while len(text) - start > size:
        cut = _CUT.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _borders(ids: dict[str, int], name: str) -> tuple[int, int]:
    for bos, eos in BORDERS:
        if bos in ids and eos in ids:
            return ids[bos], ids[eos]
    known = ", ".join(f"{bos} and {eos}" for bos, eos in BORDERS)
    raise UserError.one(
        KEY, f"{name!r} marks no document borders: add the tokens of one of these pairs: {known}"
    )
