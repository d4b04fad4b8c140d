"""Tables by which one launch reaches many tensors: where they lie, and who takes which part."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megallama_kernels.language import tl

ALIGNMENT = 16
"""Bytes, of the widest load."""


@lru_cache(maxsize=64)
def chunks(lengths: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """Cut tensors of these lengths: int64 `[chunks, 3]` of tensor, first element, elements."""
    length = torch.tensor(lengths, dtype=torch.int64)
    number = (length + chunk - 1) // chunk
    tensor = torch.repeat_interleave(torch.arange(len(lengths)), number)
    nth = torch.arange(len(tensor)) - (number.cumsum(0) - number)[tensor]
    elements = torch.minimum(length[tensor] - nth * chunk, torch.tensor(chunk))
    return torch.stack([tensor, nth * chunk, elements], dim=1).to(device)


def addresses(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, bool]:
    """Where lists of equally many contiguous tensors lie.

    Returns:
        int64 `[tensors, lists]` on their device, and whether all allow the widest loads.

    Raises:
        ValueError: a list has several dtypes, or a tensor that is not contiguous, or corresponding
            tensors of two lists differ in size or device.

    """
    device = lists[0][0].device
    for tensors in lists:
        if any(x.dtype != tensors[0].dtype for x in tensors):
            raise ValueError("one list has tensors of several dtypes")
        if any(not x.is_contiguous() or x.device != device for x in tensors):
            raise ValueError("tensors are not contiguous on one device")
    if any(len({x.numel() for x in row}) > 1 for row in zip(*lists, strict=True)):
        raise ValueError("corresponding tensors differ in size")
    rows = [[x.data_ptr() for x in row] for row in zip(*lists, strict=True)]
    # From pinned memory, or the copy would wait for the device.
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    aligned = all(address % ALIGNMENT == 0 for row in rows for address in row)
    return table.to(device, non_blocking=True), aligned


def element_type(x: Tensor) -> Any:
    """Triton's name of a dtype."""
    return getattr(tl, str(x.dtype).removeprefix("torch."))
