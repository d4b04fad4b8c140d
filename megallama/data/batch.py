"""Samples to the flat micro-batches that one rank reads at one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megallama.data.sampler import Sample, Samples


@dataclass(frozen=True)
class Batch:
    """One micro-batch as a packed stream of T = micro_batch · seq_len tokens.

    tokens, labels, position_ids: int64 [T]; labels are shifted already, -100 is ignored; positions
    restart at each document and each row. cu_seqlens: borders of rows and documents, 0 ... T, kept
    on the host so that planning attention never waits for a device.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: tuple[int, ...]


def pack(samples: Sequence[Sample]) -> Batch:
    """Lay samples end to end."""
    borders = [np.zeros(1, dtype=np.int64)]
    for sample in samples:
        borders.append(sample.cu_seqlens[1:] + borders[-1][-1])
    cu_seqlens = np.concatenate(borders)
    starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return Batch(
        tokens=torch.from_numpy(np.concatenate([sample.tokens for sample in samples])),
        labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
        position_ids=torch.from_numpy(np.arange(len(starts)) - starts),
        cu_seqlens=tuple(cu_seqlens.tolist()),
    )


def sample_indices(
    step: int, global_samples: int, micro_batch: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Sample indices that a data-parallel rank reads at a step, one list per micro-batch.

    Together the ranks read global_samples · step and the global_samples - 1 after it, whatever
    dp_size and micro_batch are. Raises ValueError unless micro_batch · dp_size divides
    global_samples.
    """
    stride = micro_batch * dp_size
    if global_samples % stride:
        raise ValueError(f"{global_samples=} is no multiple of {micro_batch=} x {dp_size=}")
    first = global_samples * step + micro_batch * dp_rank
    return [
        [base + row for row in range(micro_batch)]
        for base in range(first, first + global_samples, stride)
    ]


def micro_batches(
    samples: Samples,
    step: int,
    *,
    global_samples: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
) -> list[Batch]:
    """The micro-batches of a step for one data-parallel rank, read and packed."""
    indices = sample_indices(step, global_samples, micro_batch, dp_rank, dp_size)
    return [pack([samples[i] for i in rows]) for rows in indices]
