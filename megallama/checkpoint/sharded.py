"""Saves and loads a training state as shards, by all ranks together (torch.distributed.checkpoint).

Tensors are keyed by global names, so a checkpoint fits any layout.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim import Optimizer

from megallama.checkpoint.store import (
    FileDigest,
    Manifest,
    commit,
    committed_folder,
    digest_file,
    keep_newest,
    newest_valid,
    partial_folder,
    remove_partial,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    root: Path, module: nn.Module, optimizer: Optimizer, *, keep: int, about: dict[str, Any]
) -> Path:
    """Write and commit a checkpoint; every rank calls it after the same step.

    Args:
        root: the run's checkpoint folder, shared by all ranks.
        module: this rank's stage, with global parameter names.
        optimizer: AdamW over its parameters.
        keep: newest checkpoints to keep, this one included.
        about: the manifest's fields but `files`.

    Returns:
        The committed folder.

    """
    step = about["step"]
    partial = partial_folder(root, step)
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        remove_partial(root)
        partial.mkdir()
    dist.barrier()
    dcp.save(dict(_tensors(module, optimizer)), checkpoint_id=partial)
    digests: list[dict[str, FileDigest] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, _digest_own_files(partial))
    if dist.get_rank() == 0:
        files = {name: digest for part in digests if part for name, digest in part.items()}
        commit(root, Manifest(**about, files=files))
        keep_newest(root, keep, step)
    dist.barrier()
    return committed_folder(root, step)


def find_newest(root: Path) -> tuple[Manifest | None, list[str]]:
    """The newest valid checkpoint, the same on every rank, and why newer ones were passed over.

    One rank reads and checks; leftovers of interrupted saves are removed.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        remove_partial(root)
        found = [newest_valid(root)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def load(root: Path, manifest: Manifest, module: nn.Module, optimizer: Optimizer) -> None:
    """Fill parameters and optimizer state in place; every rank calls it."""
    _create_state(optimizer, manifest.step)
    state = dict(_tensors(module, optimizer))
    dcp.load(state, checkpoint_id=committed_folder(root, manifest.step))


def _tensors(module: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"model.{name}", parameter.detach()
        for moment in _MOMENTS:
            yield f"optimizer.{name}.{moment}", optimizer.state[parameter][moment]


def _create_state(optimizer: Optimizer, step: int) -> None:
    """The state AdamW would have made on its first step, at the checkpoint's step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] else torch.device("cpu")
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _digest_own_files(folder: Path) -> dict[str, FileDigest]:
    rank = dist.get_rank()
    own = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    return {path.name: digest_file(path) for path in own}
