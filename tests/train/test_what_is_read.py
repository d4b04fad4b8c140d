"""What a step reads follows from its number alone: real samples, every way to deal them out."""

import pytest
import torch

from megallama.config.schema import DataConfig
from megallama.data.batch import micro_batches
from megallama.data.dataset import Dataset, prepare

SEQ_LEN, SAMPLES = 32, 8


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return prepare(DataConfig(seq_len=SEQ_LEN), seed=42, vocab=512)


def rows(dataset: Dataset, step: int, micro_batch: int, dp_size: int) -> list[bytes]:
    """Tokens, labels and positions of each sequence that all ranks together read."""
    found = []
    for rank in range(dp_size):
        batches = micro_batches(
            dataset.train,
            step,
            global_samples=SAMPLES,
            micro_batch=micro_batch,
            dp_rank=rank,
            dp_size=dp_size,
        )
        for batch in batches:
            streams = torch.stack([batch.tokens, batch.labels, batch.position_ids])
            found += [part.numpy().tobytes() for part in streams.split(SEQ_LEN, dim=1)]
    return sorted(found)


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_layout_does_not_decide_what_a_step_reads(dataset: Dataset, step: int):
    whole = rows(dataset, step, SAMPLES, 1)
    assert len(set(whole)) == SAMPLES
    for dp_size, micro_batch in [(1, 1), (2, 1), (2, 4), (4, 2), (8, 1)]:
        assert rows(dataset, step, micro_batch, dp_size) == whole


def test_steps_read_different_samples(dataset: Dataset):
    read = [set(rows(dataset, step, 1, 1)) for step in range(4)]
    assert len(set.union(*read)) == 4 * SAMPLES
