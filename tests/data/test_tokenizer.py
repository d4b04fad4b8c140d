import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data import train_tokenizer
from megallama.data.tokenizer import SHIPPED, Tokenizer, cut_pieces, load_tokenizer
from tests.data.conftest import user_error

WORDS = ["self", "import", "return", "the", "'s", "  ", "    ", "==", "):\n", "\n\n"]
BPE512 = Path(train_tokenizer.__file__).with_name(f"{SHIPPED}.json")


@pytest.fixture
def as_file(tmp_path: Path):
    """Write a variant of the shipped tokenizer and give its path."""

    def write(**changes: object) -> str:
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(json.loads(BPE512.read_text()) | changes))
        return str(file)

    return write


def borders(*names: str) -> dict[str, object]:
    """The shipped model, with `names` at ids 600, 601 ... in place of its own special tokens."""
    model = json.loads(BPE512.read_text())["model"]
    own = {token: i for token, i in model["vocab"].items() if i > 1}
    ids = {name: 600 + n for n, name in enumerate(names)}
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    tokens = [{"id": i, "content": name, "special": True} | flags for name, i in ids.items()]
    return {"model": model | {"vocab": own | ids}, "added_tokens": tokens}


def test_shipped(bpe512: Tokenizer):
    assert (bpe512.vocab, bpe512.bos, bpe512.eos) == (512, 0, 1)


@given(text=st.text())
@settings(deadline=None)
def test_text_round_trips(bpe512: Tokenizer, text: str):
    assert bpe512.decode(bpe512.encode([text])[0]) == text


def test_special_names_in_a_text_are_text(bpe512: Tokenizer):
    text = "a<|end_of_text|>b<|begin_of_text|>"
    (ids,) = bpe512.encode([text])
    assert not {bpe512.bos, bpe512.eos} & set(ids)
    assert bpe512.decode(ids) == text


def test_decode_shows_special_tokens(bpe512: Tokenizer):
    assert bpe512.decode([bpe512.bos, bpe512.eos]) == "<|begin_of_text|><|end_of_text|>"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Tokenizer:
    """The shipped merges over GPT-2's way to cut text into words."""
    file = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(json.loads(BPE512.read_text()) | {"pre_tokenizer": cut}))
    return load_tokenizer(str(file))


@given(
    words=st.lists(st.sampled_from([*WORDS, *" \n\n\n\t\r\u2028.,'1é字"]), max_size=100),
    size=st.integers(1, 20),
)
@settings(deadline=None)
def test_pieces_have_the_tokens_of_the_whole(
    bpe512: Tokenizer, gpt2: Tokenizer, words: list[str], size: int
):
    text = "".join(words)
    pieces = list(cut_pieces(text, size))
    assert "".join(pieces) == text
    for tokenizer in (bpe512, gpt2):
        (whole,) = tokenizer.encode([text])
        assert [i for ids in tokenizer.encode(pieces) for i in ids] == whole


def test_long_text_is_cut():
    pieces = list(cut_pieces("one line\n" * 1000, 100))
    assert all(100 <= len(piece) <= 109 for piece in pieces[:-1])
    assert len(pieces) > 80


def test_truncation_and_padding_in_the_file_are_off(as_file):
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    tokenizer = load_tokenizer(as_file(truncation=cut, padding=pad))
    text = "import this\n"
    assert tokenizer.encode([text]) == load_tokenizer("bpe512").encode([text])


@pytest.mark.parametrize(
    ("names", "bos", "eos"),
    [
        (["<s>", "</s>"], 600, 601),
        (["</s>", "<s>"], 601, 600),
        (["<|endoftext|>"], 600, 600),
        (["<|endoftext|>", "<s>", "</s>"], 601, 602),
        (["<s>", "<|endoftext|>"], 601, 601),
    ],
)
def test_border_names(as_file, names: list[str], bos: int, eos: int):
    tokenizer = load_tokenizer(as_file(**borders(*names)))
    assert (tokenizer.bos, tokenizer.eos) == (bos, eos)
    assert tokenizer.vocab == 600 + len(names)  # ids have a gap, rows are needed for all


def test_no_borders(as_file):
    path = as_file(**borders())
    with user_error("data.tokenizer", path, "<|begin_of_text|> and <|end_of_text|>", "<s>"):
        load_tokenizer(path)


def test_missing(tmp_path: Path):
    with user_error("data.tokenizer", "nowhere.json", "bpe512"):
        load_tokenizer(str(tmp_path / "nowhere.json"))


def test_folder(tmp_path: Path):
    with user_error("data.tokenizer", "folder", f"{tmp_path}/tokenizer.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "BPE"}}', "\0"])
def test_invalid(tmp_path: Path, content: str):
    file = tmp_path / "t.json"
    file.write_text(content)
    with user_error("data.tokenizer", "t.json", "not a Hugging Face tokenizer.json"):
        load_tokenizer(str(file))


def test_digest_follows_the_content(as_file, bpe512: Tokenizer):
    first = load_tokenizer(as_file(version="1.0")).digest
    assert load_tokenizer(as_file(version="1.0")).digest == first
    assert load_tokenizer(as_file(**borders("<s>", "</s>"))).digest != first


def test_training_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, out = tmp_path / "a.txt", tmp_path / "out.json"
    source.write_text("the cat and the hat and the bat. " * 20)
    arguments = ["", str(out), "--source", str(source), "--vocab", "270"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert train_tokenizer.main() == 0
    tokenizer = load_tokenizer(str(out))
    assert 258 < tokenizer.vocab <= 270
    assert len(tokenizer.encode([" the"])[0]) == 1
    assert tokenizer.decode(tokenizer.encode(["naïve 字"])[0]) == "naïve 字"


def test_training_command_without_text(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "out"), "--source", "nowhere.txt"])
    assert train_tokenizer.main() == 2
    assert "nowhere.txt" in capsys.readouterr().err
