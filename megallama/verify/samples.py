"""Random documents, with labels ignored unevenly so that a mean of means cannot hide."""

from dataclasses import dataclass

import numpy as np

from megallama.config.schema import Config
from megallama.data.sampler import Sample
from megallama.model.seams import IGNORED_LABEL

MEAN_DOCUMENT = 12
"""Tokens; documents end in the middle of sequences, chunks and token slices."""


@dataclass(frozen=True)
class RandomSamples:
    """Sample i follows from (seed, i) alone; between none and 9 in 10 of its labels are ignored."""

    seq_len: int
    vocab: int
    document_mask: bool
    seed: int

    def __getitem__(self, index: int) -> Sample:
        """One sequence."""
        rng = np.random.default_rng((self.seed, index))
        stream = rng.integers(0, self.vocab, self.seq_len + 1)
        labels = stream[1:].copy()
        labels[rng.random(self.seq_len) < (index % 7) * 0.15] = IGNORED_LABEL
        inner = np.arange(1, self.seq_len)[rng.random(self.seq_len - 1) < 1 / MEAN_DOCUMENT]
        borders = [0, *inner, self.seq_len] if self.document_mask else [0, self.seq_len]
        return Sample(stream[:-1], labels, np.array(borders, dtype=np.int32))


def random_samples(config: Config) -> RandomSamples:
    """The samples that a shrunk config is verified on."""
    data = config.data
    return RandomSamples(data.seq_len, config.model.vocab, data.document_mask, config.train.seed)


def global_samples(config: Config) -> int:
    """Sequences in one step."""
    return config.train.global_batch_tokens // config.data.seq_len
