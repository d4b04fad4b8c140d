"""Runs a shrunk config on its layout, through the production path, and writes down what is seen."""

import os
from pathlib import Path
from typing import Any

import torch
from megallama_launch.failure import guard
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megallama.config.schema import Config
from megallama.mesh import coordinates_of, coordinates_text
from megallama.train.environment import Place, find_place
from megallama.train.loop import read_step
from megallama.train.lr import learning_rate
from megallama.train.session import build_trainer, process_group
from megallama.train.step import Trainer, train_step
from megallama.verify.counting import CommunicationCounter
from megallama.verify.samples import random_samples

COUNTED_STEP = 1
"""The second: the first also sets things up."""


def run(plain_config: dict[str, Any], folder: str) -> int:
    """As one rank: train, save to `folder/rank-N.pt`; returns the exit code."""
    config = Config.model_validate(plain_config)
    place = find_place(os.environ)
    assert place is not None
    places = coordinates_of(place.rank, config.layout)
    return guard(_run, config, place, folder, coordinates=lambda: coordinates_text(places))


def _run(config: Config, place: Place, folder: str) -> None:
    with process_group(place) as device:
        trainer = build_trainer(config, device)
        seen = _train(trainer)
        torch.save(seen, Path(folder) / f"rank-{place.rank}.pt")


def _train(trainer: Trainer) -> dict[str, Any]:
    config, module = trainer.config, trainer.stages.module
    samples = random_samples(config)
    seen: dict[str, Any] = {"loss": [], "grad_norm": [], "initial": _masters(trainer)}

    def note_gradients(*_: Any) -> None:
        if "gradient" not in seen:
            seen["gradient"] = _gradients(module)

    trainer.optimizer.register_step_pre_hook(note_gradients)
    for step in range(config.train.steps):
        lr = learning_rate(config.lr_schedule, config.optimizer.lr, config.train.steps, step)
        batches = read_step(trainer, samples, step)
        counter = CommunicationCounter(trainer.groups)
        if step == min(COUNTED_STEP, config.train.steps - 1):
            with counter:
                result = train_step(trainer, batches, lr)
            seen["calls"], seen["bytes"] = dict(counter.calls), dict(counter.bytes)
        else:
            result = train_step(trainer, batches, lr)
        seen["loss"].append(result.loss)
        seen["grad_norm"].append(result.grad_norm)
    return seen | {"final": _masters(trainer)}


def _masters(trainer: Trainer) -> list[tuple[Any, ...]]:
    state = trainer.optimizer.canonical_state()
    names = dict(trainer.stages.module.named_parameters())
    return [_region(name, state[f"model.{name}"]) for name in names]


def _gradients(module: nn.Module) -> list[tuple[Any, ...]]:
    return [_region(name, parameter.grad) for name, parameter in module.named_parameters()]


def _region(name: str, tensor: Tensor | None) -> tuple[Any, ...]:
    """`(name, offsets, tensor)` of the part of a whole tensor that this rank holds.

    Offsets are DTensor's own account of what is where, not ours, so that a mistake in ours shows.
    """
    assert isinstance(tensor, DTensor), f"{name} got no gradient"
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return name, tuple(offsets), tensor.to_local().detach().clone()
