import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from megallama.config.errors import UserError
from megallama.config.schema import DataConfig, SourceConfig
from megallama.data.batch import micro_batches
from megallama.data.dataset import prepare
from megallama.data.sampler import IGNORED
from megallama.data.tokenizer import Tokenizer
from megallama.data.writer import is_held_out
from tests.data.conftest import user_error

TEXTS = [f"{n}: " + "some words of text " * (n % 5 + 1) for n in range(60)]


@pytest.fixture
def corpus(write_jsonl) -> Path:
    return write_jsonl(TEXTS)


def naive_samples(texts: list[str], tokenizer: Tokenizer, seq_len: int) -> list[tuple]:
    """(tokens, labels, cu_seqlens) of all windows, from the texts, one token at a time."""
    stream = []
    for number, text in enumerate(texts):
        ids = [tokenizer.bos, *tokenizer.encode([text])[0], tokenizer.eos]
        stream += [(token, number) for token in ids]
    rows = []
    for a in range(0, len(stream) - seq_len, seq_len):
        row = stream[a : a + seq_len + 1]
        tokens = [token for token, _ in row[:-1]]
        labels = [b if n == m else -100 for (_, m), (b, n) in pairwise(row)]
        starts = [t for t in range(1, seq_len) if row[t][1] != row[t - 1][1]]
        rows.append((tokens, labels, [0, *starts, seq_len]))
    return rows


@pytest.mark.parametrize("seq_len", [5, 16, 100])
def test_an_epoch_is_the_text(corpus: Path, config_of, bpe512: Tokenizer, seq_len: int):
    data = prepare(config_of(corpus, seq_len=seq_len), 1, 512)
    expected = naive_samples(TEXTS, bpe512, seq_len)
    read = [data.train[i] for i in range(len(expected))]
    as_lists = [(s.tokens.tolist(), s.labels.tolist(), s.cu_seqlens.tolist()) for s in read]
    assert as_lists != expected  # shuffled
    assert sorted(as_lists) == sorted(expected)


def test_held_out(corpus: Path, config_of, bpe512: Tokenizer):
    data = prepare(config_of(corpus, held_out=0.2), 1, 512)
    kept = [text for text in TEXTS if is_held_out(text, 0.2)]
    trained = [text for text in TEXTS if not is_held_out(text, 0.2)]
    for samples, texts in ((data.held_out, kept), (data.train, trained)):
        assert samples is not None
        expected = naive_samples(texts, bpe512, 16)
        read = [samples[i] for i in range(len(expected))]
        assert sorted(s.tokens.tolist() for s in read) == sorted(t for t, _, _ in expected)
    assert data.documents == len(trained)
    assert f"{len(kept)} documents held out" in data.summary


def test_held_out_order_is_the_same_for_every_seed(corpus: Path, config_of):
    one, two = (prepare(config_of(corpus, held_out=0.3), seed, 512) for seed in (1, 2))
    assert one.held_out is not None and two.held_out is not None
    for i in range(50):
        assert one.held_out[i].tokens.tolist() == two.held_out[i].tokens.tolist()
    assert any(one.train[i].tokens.tolist() != two.train[i].tokens.tolist() for i in range(5))


def test_too_few_documents_to_hold_out(write_jsonl, config_of):
    text = next(text for text in TEXTS[4:] if not is_held_out(text, 0.02))
    data = prepare(config_of(write_jsonl([text]), held_out=0.02), 1, 512)
    assert data.held_out is None
    assert data.held_out_bytes_per_token is None
    assert "nothing held out" in data.summary


def test_bytes_per_token_turns_loss_into_bits_per_byte(corpus: Path, config_of):
    """Over a whole epoch, bytes of text and tokens with a loss are counted one by one."""
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    for mask in (True, False):
        data = prepare(config_of(corpus, seq_len=1, document_mask=mask), 1, 512)
        labels = [int(data.train[i].labels[0]) for i in range(data.tokens - 1)]
        # Without a mask, one token has no loss: nothing stands before the first.
        with_loss = sum(label != IGNORED for label in labels) + (not mask)
        assert data.bytes_per_token == pytest.approx(text_bytes / with_loss, rel=1e-12)


def test_bytes_per_token_of_a_mix(write_jsonl, config_of, tmp_path: Path):
    dense, sparse = (
        write_jsonl(["import self " * 50], "a.jsonl"),
        write_jsonl(["字" * 99], "b.jsonl"),
    )
    one, other = (prepare(config_of(file), 1, 512).bytes_per_token for file in (dense, sparse))
    mixed = prepare(config_of((dense, 3.0), (sparse, 1.0)), 1, 512).bytes_per_token
    assert mixed == pytest.approx(0.75 * one + 0.25 * other)


def test_fingerprint_names_the_stream(corpus: Path, config_of, write_jsonl, tmp_path: Path):
    other = write_jsonl(TEXTS[1:], "other.jsonl")
    same = corpus.rename(tmp_path / "moved.jsonl")
    corpus.write_text(same.read_text())

    def fingerprint(*paths: object, seed: int = 1, **fields: object) -> str:
        return prepare(config_of(*paths, **fields), seed, 512).fingerprint

    base = fingerprint(corpus)
    assert base == fingerprint(same) == fingerprint((corpus, 7.0), cache=str(tmp_path / "c2"))
    different = [
        fingerprint(other),
        fingerprint(corpus, seed=2),
        fingerprint(corpus, seq_len=17),
        fingerprint(corpus, document_mask=False),
        fingerprint(corpus, held_out=0.3),
        fingerprint((corpus, 3.0), (other, 1.0)),
        fingerprint((corpus, 1.0), (other, 3.0)),
        fingerprint((other, 3.0), (corpus, 1.0)),
    ]
    assert len({base, *different}) == 1 + len(different)


def test_layout_never_changes_the_tokens_of_a_step(corpus: Path, config_of):
    data = prepare(config_of(corpus), 1, 512)

    def step(micro_batch: int, dp_size: int) -> list[list[int]]:
        rows = []
        for rank in range(dp_size):
            for batch in micro_batches(
                data.train,
                10**9,
                global_samples=12,
                micro_batch=micro_batch,
                dp_rank=rank,
                dp_size=dp_size,
            ):
                rows += batch.tokens.view(-1, 16).tolist()
        return sorted(rows)

    layouts = [(1, 1), (12, 1), (1, 12), (2, 3), (3, 2), (6, 2)]
    assert len({str(step(*layout)) for layout in layouts}) == 1


def test_stdlib_default(tmp_path: Path):
    data = prepare(DataConfig(cache=str(tmp_path)), 42, 512)
    assert data.tokens > 1_000_000
    assert 1.9 < data.bytes_per_token < 2.6
    assert len(data.train[0].tokens) == 192
    assert data.summary.startswith("stdlib: ")
    assert "\n" not in data.summary


def test_never_loads_torch_or_pyarrow(tmp_path: Path, corpus: Path, config_of):
    """A command that looks at the data starts at once."""
    code = (
        "import sys; from megallama.data.dataset import prepare\n"
        "from megallama.config.schema import DataConfig\n"
        "prepare(DataConfig.model_validate_json(sys.argv[1]), 1, 512)\n"
        "assert not {'torch', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, config_of(corpus).model_dump_json()], check=True)


# What the user must fix


def test_vocabulary_above_the_models(corpus: Path, config_of):
    prepare(config_of(corpus), 1, 512)
    with user_error("model.vocab", "511", "512 tokens", "'bpe512'", "set model.vocab to 512"):
        prepare(config_of(corpus), 1, 511)


def test_too_little_text(write_jsonl, config_of, bpe512: Tokenizer):
    file = write_jsonl(["a few words"])
    tokens = len(bpe512.encode(["a few words"])[0]) + 2
    with user_error("data.seq_len", "16", f"{tokens} tokens", str(file), f"at most {tokens - 1}"):
        prepare(config_of(file), 1, 512)
    prepare(config_of(file, seq_len=tokens - 1), 1, 512)
    with user_error("data.seq_len"):
        prepare(config_of(file, seq_len=tokens), 1, 512)


def test_too_little_text_in_one_of_two(corpus: Path, write_jsonl, config_of):
    with user_error("data.seq_len", "small.jsonl"):
        prepare(config_of(corpus, write_jsonl(["short"], "small.jsonl")), 1, 512)


def test_everything_held_out(write_jsonl, config_of):
    file = write_jsonl([next(text for text in TEXTS if is_held_out(text, 0.5))])
    with user_error("data.held_out", "0.5", str(file), "set it to 0"):
        prepare(config_of(file, held_out=0.5), 1, 512)


def test_weight_that_is_never_drawn(corpus: Path, config_of):
    with user_error("data.sources.1.weight", "1e-06", "one sample in 4096"):
        prepare(config_of((corpus, 1.0), (corpus, 1e-6)), 1, 512)


def test_weight_in_the_message_works(corpus: Path, config_of):
    with pytest.raises(UserError) as caught:
        prepare(config_of((corpus, 3.0), (corpus, 1e-6)), 1, 512)
    words = str(caught.value).split()
    advised = float(words[words.index("to") + 1])
    prepare(config_of((corpus, 3.0), (corpus, advised)), 1, 512)


@pytest.mark.parametrize("weights", [(1.0, math.inf), (1e308, 1e308)])
def test_weights_without_a_sum(corpus: Path, weights: tuple[float, float]):
    sources = [SourceConfig.model_construct(path=str(corpus), weight=w) for w in weights]
    config = DataConfig.model_construct(sources=sources, tokenizer="bpe512")
    with user_error("data.sources", "no finite sum"):
        prepare(config, 1, 512)


def test_all_missing_sources_are_named_at_once(corpus: Path, config_of: Callable[..., DataConfig]):
    with pytest.raises(UserError) as caught:
        prepare(config_of("nowhere.txt", corpus, "nowhere.jsonl"), 1, 512)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["data.sources.0.path", "data.sources.2.path"]


def test_tokenizer_that_is_not_there(corpus: Path, config_of):
    with user_error("data.tokenizer"):
        prepare(config_of(corpus, tokenizer="nowhere.json"), 1, 512)


def test_unusable_cache(corpus: Path, config_of):
    with user_error("data.cache", str(corpus)):
        prepare(config_of(corpus, cache=str(corpus)), 1, 512)
