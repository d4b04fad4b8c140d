"""Which tokens sample i holds: a pure function of (seed, i), so that resuming needs one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megallama.data.permutation import derive_key, permute
from megallama.data.shards import Split

IGNORED = -100
BLOCK = 4096


@dataclass(frozen=True)
class Sample:
    """One sequence.

    tokens, labels: int64 [seq_len]; labels[t] is the token after tokens[t], or IGNORED.
    cu_seqlens: int32 [n + 1], document borders from 0 to seq_len.
    """

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray


class Samples(Protocol):
    """An endless stream of samples. Any reader with this one method can feed a run."""

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` >= 0: the same on every rank, in every process, in every layout."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a sample is read: window `window` of source `source`, in that source's `epoch`."""

    source: int
    epoch: int
    window: int


def quotas(weights: Sequence[float]) -> list[int]:
    """Slots out of BLOCK for each weight: less than one away from its exact share, BLOCK in all."""
    shares = [weight * BLOCK / sum(weights) for weight in weights]
    slots = [int(share) for share in shares]
    largest_remainder = sorted(range(len(shares)), key=lambda q: slots[q] - shares[q])
    for q in largest_remainder[: BLOCK - sum(slots)]:
        slots[q] += 1
    return slots


def count_windows(tokens: int, seq_len: int) -> int:
    """Sequences cut from a stream: each needs one more token than it holds, its last label."""
    return max(0, tokens - 1) // seq_len


class MixedSamples:
    """Windows of several token streams, mixed by weight; every stream is shuffled anew each epoch.

    Samples come in blocks of BLOCK slots. A slot belongs to a source, each source has exactly its
    quota of slots in every block, and its n-th slot since sample 0 reads its n-th shuffled window.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        weights: Sequence[float],
        *,
        seq_len: int,
        document_mask: bool,
        seed: int,
    ) -> None:
        self.splits = splits
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.seed = seed
        self.windows = [count_windows(len(split.tokens), seq_len) for split in splits]
        self.quotas = quotas(weights)
        in_order = [q for q, quota in enumerate(self.quotas) for _ in range(quota)]
        key = derive_key(seed)
        self.slots = [in_order[permute(slot, BLOCK, key)] for slot in range(BLOCK)]
        self.rank_in_block = _ranks(self.slots)

    def locate(self, index: int) -> Place:
        """Where sample `index` is read."""
        block, slot = divmod(index, BLOCK)
        source = self.slots[slot]
        local = block * self.quotas[source] + self.rank_in_block[slot]
        epoch, i = divmod(local, self.windows[source])
        key = derive_key(self.seed, source, epoch)
        return Place(source, epoch, permute(i, self.windows[source], key))

    def __getitem__(self, index: int) -> Sample:
        place = self.locate(index)
        start = place.window * self.seq_len
        return cut_sample(self.splits[place.source], start, self.seq_len, self.document_mask)


def cut_sample(split: Split, start: int, seq_len: int, document_mask: bool) -> Sample:
    """The sequence at tokens [start, start + seq_len) of a stream that holds one more token.

    With document_mask, cu_seqlens has a border at each document's start, and the last token of a
    document predicts nothing: its label would be the next document's first token.
    """
    end = start + seq_len
    span = np.asarray(split.tokens[start : end + 1]).astype(np.int64)
    tokens, labels = span[:-1], span[1:]
    if not document_mask:
        return Sample(tokens, labels, np.array([0, seq_len], dtype=np.int32))
    # Of the ends' own type: anything else would convert the whole file in every call.
    bounds = np.array([start, end], dtype=split.ends.dtype)
    first, last = np.searchsorted(split.ends, bounds, side="right")
    borders = np.asarray(split.ends[first:last]).astype(np.int64) - start
    labels = labels.copy()  # it shares memory with tokens
    labels[borders - 1] = IGNORED
    inner = borders[borders < seq_len]
    return Sample(tokens, labels, np.array([0, *inner, seq_len], dtype=np.int32))


def _ranks(slots: Sequence[int]) -> list[int]:
    """For each slot, how many earlier slots belong to the same source."""
    seen: dict[int, int] = {}
    ranks = []
    for source in slots:
        ranks.append(seen.get(source, 0))
        seen[source] = ranks[-1] + 1
    return ranks
