"""A rank's start and end: process groups, device, trainer, and what a checkpoint restores."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megallama.checkpoint.sharded import find_newest, load, save
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.mesh import build_process_groups
from megallama.model.varlen import use_flash_attention_3
from megallama.parallel.compose import build_stages
from megallama.parallel.pipeline.runtime import connect
from megallama.train.environment import STORE, Place, restart_number
from megallama.train.identity import checkpoint_folder, run_identity
from megallama.train.optimizer import build_optimizer, choose_norm
from megallama.train.step import Trainer

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(place: Place) -> Iterator[torch.device]:
    """Join the world for the length of the block; yields this rank's device."""
    cuda = torch.cuda.is_available()
    # SLURM can show each task its own GPU only, as number 0.
    index = place.local_rank if torch.cuda.device_count() > 1 else 0
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if cuda else "gloo",
        store=_store(place),
        rank=place.rank,
        world_size=place.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    yield device
    # Not in a finally: after a failure, ranks stuck in a collective would keep this one waiting.
    dist.destroy_process_group()


def _store(place: Place) -> dist.Store:
    if STORE in os.environ:
        return dist.FileStore(os.environ[STORE], place.world_size)
    store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    # torchrun's store outlives its workers: a restarted rank must not find the old ones' addresses.
    return dist.PrefixStore(f"attempt_{restart_number()}", store)


def set_determinism(config: Config) -> None:
    """Seed the generators that code outside of ours may use; deterministic kernels if asked."""
    random.seed(config.train.seed)
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def build_trainer(config: Config, device: torch.device) -> Trainer:
    """This rank's model, optimizer and process groups; torch.distributed is initialised."""
    set_determinism(config)
    if config.kernels.attention == "fa3":
        use_flash_attention_3()
    groups = build_process_groups(
        config.layout, device.type, tie_embeddings=config.model.tie_embeddings
    )
    connect(groups, device)
    stages = build_stages(config, groups, device)
    optimizer = build_optimizer(
        stages.module, config.optimizer, config.kernels, device.type, stages.low
    )
    norm = choose_norm(config.kernels, device.type)
    return Trainer(config, groups, stages, optimizer, norm)


def save_checkpoint(trainer: Trainer, dataset: Dataset, step: int) -> Path:
    """Commit the state after `step` completed steps."""
    config = trainer.config
    about = {
        "step": step,
        "tokens": step * config.train.global_batch_tokens,
        "layout": config.layout.model_dump(),
        **run_identity(config, dataset),
    }
    return save(
        checkpoint_folder(config),
        trainer.optimizer.canonical_state(),
        keep=config.checkpoint.keep,
        about=about,
    )


def resume(trainer: Trainer) -> tuple[int, list[str]]:
    """Load the newest valid checkpoint, if there is one.

    Returns:
        Completed steps, and what to tell the user about checkpoints that were passed over.

    """
    root = checkpoint_folder(trainer.config)
    manifest, passed_over = find_newest(root)
    if manifest is None:
        return 0, passed_over
    state = trainer.optimizer.canonical_state()
    load(root, manifest, state)
    trainer.optimizer.take(state, manifest.step)
    return manifest.step, passed_over
