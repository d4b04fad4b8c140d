"""Saves and loads a training state as shards, by all ranks together (torch.distributed.checkpoint).

Tensors are keyed by global names, so a checkpoint fits any layout.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megallama.checkpoint.store import (
    FileDigest,
    Manifest,
    commit,
    committed_folder,
    digest_file,
    keep_newest,
    list_candidates,
    newest_valid,
    partial_folder,
    reason_against,
    remove_partial,
)


def save(root: Path, state: Mapping[str, Tensor], *, keep: int, about: dict[str, Any]) -> Path:
    """Write and commit a checkpoint; every rank calls it after the same step.

    Args:
        root: the run's checkpoint folder, shared by all ranks.
        state: this rank's tensors by global name.
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
    dcp.save(dict(state), checkpoint_id=partial)
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

    Rank 0 lists, and all ranks read and check a part of the files each: one rank alone would take
    longer over a large checkpoint than the others may wait. Leftovers of interrupted saves are
    removed.
    """
    if dist.get_rank() == 0:
        remove_partial(root)
    return newest_valid(root, _list_together, _judge_together)


def _list_together(root: Path) -> list[tuple[Manifest | None, str]]:
    listed: list[Any] = [list_candidates(root) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(listed, src=0)
    candidates: list[tuple[Manifest | None, str]] = listed[0]
    return candidates


def _judge_together(folder: Path, files: Mapping[str, FileDigest]) -> str | None:
    rank, world = dist.get_rank(), dist.get_world_size()
    own = dict(sorted(files.items())[rank::world])
    reasons: list[str | None] = [None] * world
    dist.all_gather_object(reasons, reason_against(folder, own))
    return next((reason for reason in reasons if reason is not None), None)


def load(root: Path, manifest: Manifest, state: Mapping[str, Tensor]) -> None:
    """Fill this rank's tensors in place; every rank calls it."""
    dcp.load(dict(state), checkpoint_id=committed_folder(root, manifest.step))


def _digest_own_files(folder: Path) -> dict[str, FileDigest]:
    rank = dist.get_rank()
    own = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    return {path.name: digest_file(path) for path in own}
