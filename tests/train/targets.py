"""What ranks run in place of `megallama.cli:train_rank`: the same, with one fault planted."""

import os
from typing import Any

import torch

from megallama.cli import train_rank
from megallama.train import loop
from megallama.train.step import Trainer

VICTIM = 1
FAULTY_STEP = 2


def fail_at_a_step(plain: dict[str, Any]) -> int:
    """One rank raises while the others go on."""
    read = loop.read_step

    def read_step(trainer: Trainer, samples: Any, step: int) -> Any:
        if step == FAULTY_STEP and int(os.environ["RANK"]) == VICTIM:
            raise ValueError("the shelf is empty")
        return read(trainer, samples, step)

    loop.read_step = read_step
    return train_rank(plain)


def poison_a_weight(plain: dict[str, Any]) -> int:
    """One weight of one rank becomes NaN."""
    build = loop.build_trainer

    def build_trainer(*args: Any) -> Trainer:
        trainer = build(*args)
        if int(os.environ["RANK"]) == VICTIM:
            weight = next(trainer.stages.module.parameters()).detach()
            weight.to_local().view(-1)[0] = torch.nan
        return trainer

    loop.build_trainer = build_trainer
    return train_rank(plain)
