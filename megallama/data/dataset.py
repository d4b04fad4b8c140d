"""From the `data` section of the YAML to streams of samples, with every mistake found on the way.

`prepare` runs before any process group starts. What it returns is read through `Samples` alone, so
another reader needs to give one `Dataset` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from megallama.config.errors import Problem, UserError
from megallama.config.schema import DataConfig
from megallama.data.documents import Source, find_source
from megallama.data.permutation import derive_key
from megallama.data.sampler import BLOCK, MixedSamples, Samples, count_windows, quotas
from megallama.data.shards import Split, cache_folder, open_shard
from megallama.data.tokenizer import KEY as TOKENIZER_KEY
from megallama.data.tokenizer import Tokenizer, load_tokenizer

# One order for all runs, so that runs with different seeds are evaluated on the same sequences.
HELD_OUT_SEED = derive_key(int.from_bytes(b"held out"))


@dataclass(frozen=True)
class Dataset:
    """What a run trains and is evaluated on.

    held_out: None where too few documents were kept for one sequence. fingerprint: equal for equal
    train streams, whatever the paths and the machine. bytes_per_token: UTF-8 bytes of text per
    token that a loss is taken on, in the stream's mix of sources; bits per byte are
    loss / ln 2 / bytes_per_token. tokens, documents: in the train split, one epoch of each source.
    """

    train: Samples
    held_out: Samples | None
    fingerprint: str
    bytes_per_token: float
    held_out_bytes_per_token: float | None
    tokens: int
    documents: int
    summary: str


def prepare(config: DataConfig, seed: int, vocab: int) -> Dataset:
    """Tokenize what is not yet in the cache, and open it.

    vocab: the model's. Raises UserError for everything that the user can get wrong: sources,
    tokenizer, cache folder, weights, a vocabulary above the model's, too little text for seq_len.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    _check_vocab(tokenizer, vocab)
    sources = _find_sources(config)
    weights = [source.weight for source in config.sources]
    _check_weights(weights)
    cache = cache_folder(config.cache)
    shards = [open_shard(source, tokenizer, config.held_out, cache) for source in sources]
    train = [shard.train for shard in shards]
    for source, split in zip(sources, train, strict=True):
        _check_length(source, split, config)
    kept = [
        (shard.held_out, weight)
        for shard, weight in zip(shards, weights, strict=True)
        if count_windows(len(shard.held_out.tokens), config.seq_len)
    ]
    held_out, held_out_weights = [split for split, _ in kept], [weight for _, weight in kept]
    return Dataset(
        train=_mix(train, weights, config, seed),
        held_out=_mix(held_out, held_out_weights, config, HELD_OUT_SEED) if kept else None,
        fingerprint=_fingerprint(train, weights, config, seed),
        bytes_per_token=_bytes_per_token(train, weights, config),
        held_out_bytes_per_token=_bytes_per_token(held_out, held_out_weights, config)
        if kept
        else None,
        tokens=sum(len(split.tokens) for split in train),
        documents=sum(len(split.ends) for split in train),
        summary=_summary(sources, train, held_out, config),
    )


def _find_sources(config: DataConfig) -> list[Source]:
    """Every source's files; the error names all the sources that have none."""
    found: list[Source] = []
    problems: list[Problem] = []
    for q, source in enumerate(config.sources):
        try:
            found.append(find_source(source.path, f"data.sources.{q}.path"))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    return found


def _check_vocab(tokenizer: Tokenizer, vocab: int) -> None:
    if tokenizer.vocab > vocab:
        raise UserError.one(
            "model.vocab",
            f"{vocab} is less than the {tokenizer.vocab} tokens of {TOKENIZER_KEY} "
            f"{tokenizer.name!r}: set model.vocab to {tokenizer.vocab}",
        )


def _check_weights(weights: Sequence[float]) -> None:
    if not math.isfinite(sum(weights)):
        raise UserError.one("data.sources", f"the weights {weights} have no finite sum")
    for q, slots in enumerate(quotas(weights)):
        if slots == 0:
            raise UserError.one(
                f"data.sources.{q}.weight",
                f"{weights[q]:g} of {sum(weights):g} in all is less than one sample in {BLOCK}: "
                f"raise it to {sum(weights) / BLOCK:.2g} or remove the source",
            )


def _check_length(source: Source, split: Split, config: DataConfig) -> None:
    tokens = len(split.tokens)
    if tokens == 0:
        raise UserError.one(
            "data.held_out",
            f"{config.held_out} keeps all documents of {source.path!r} for evaluation and leaves "
            "none to train on: set it to 0, or give more documents",
        )
    if count_windows(tokens, config.seq_len) == 0:
        raise UserError.one(
            "data.seq_len",
            f"{config.seq_len} is too long for the {tokens} tokens that {source.path!r} has to "
            f"train on: set it to at most {tokens - 1}, or give more text",
        )


def _mix(
    splits: Sequence[Split], weights: Sequence[float], config: DataConfig, seed: int
) -> MixedSamples:
    return MixedSamples(
        splits, weights, seq_len=config.seq_len, document_mask=config.document_mask, seed=seed
    )


def _fingerprint(
    splits: Sequence[Split], weights: Sequence[float], config: DataConfig, seed: int
) -> str:
    parts = (seed, config.seq_len, config.document_mask, *quotas(weights))
    digests = (split.digest for split in splits)
    return xxhash.xxh3_128_hexdigest("\0".join([*map(str, parts), *digests]).encode())


def _bytes_per_token(
    splits: Sequence[Split], weights: Sequence[float], config: DataConfig
) -> float:
    total = 0.0
    for split, slots in zip(splits, quotas(weights), strict=True):
        without_loss = len(split.ends) if config.document_mask else 0
        total += slots / BLOCK * split.text_bytes / (len(split.tokens) - without_loss)
    return total


def _summary(
    sources: Sequence[Source], train: Sequence[Split], held_out: Sequence[Split], config: DataConfig
) -> str:
    documents = sum(len(split.ends) for split in train)
    tokens = sum(len(split.tokens) for split in train)
    windows = sum(count_windows(len(split.tokens), config.seq_len) for split in train)
    kept = sum(len(split.ends) for split in held_out)
    names = ", ".join(source.path for source in sources)
    return (
        f"{names}: {documents:,} documents, {tokens:,} tokens of {config.tokenizer}, "
        f"{windows:,} sequences of {config.seq_len}; "
        + (f"{kept:,} documents held out" if kept else "nothing held out for evaluation")
    )
