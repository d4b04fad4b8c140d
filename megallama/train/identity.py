"""What makes two starts the same run: a run folder is never continued as another one."""

from pathlib import Path
from typing import Any

from megallama.checkpoint.store import read_manifest
from megallama.config.errors import Problem
from megallama.config.schema import Config
from megallama.data.dataset import Dataset

_KEYS = {
    "model": "model",
    "data_fingerprint": "data (sources, tokenizer, seq_len, document_mask) or train.seed",
    "global_batch_tokens": "train.global_batch_tokens",
}


def checkpoint_folder(config: Config) -> Path:
    """Where a run's checkpoints are."""
    return Path(config.run) / "checkpoints"


def run_identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What all starts of a run have in common; layout and micro-batch size may change."""
    return {
        "model": config.model.model_dump(),
        "data_fingerprint": dataset.fingerprint,
        "global_batch_tokens": config.train.global_batch_tokens,
    }


def identity_problems(config: Config, dataset: Dataset) -> list[Problem]:
    """Where the run folder's checkpoints belong to another run; needs no process group."""
    current = run_identity(config, dataset)
    for folder in sorted(checkpoint_folder(config).glob("step-*"), reverse=True):
        try:
            manifest = read_manifest(folder)
        except ValueError:
            continue
        changed = [
            _KEYS[name] for name, value in current.items() if getattr(manifest, name) != value
        ]
        if not changed:
            return []
        what = f"{config.run!r} holds step {manifest.step} of a run with another "
        fix = ": name a new run folder, or restore the old values"
        return [Problem("run", what + ", another ".join(changed) + fix)]
    return []
