"""Everything a user can get wrong, found before any process group starts."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from megallama.config.errors import Problem, UserError
from megallama.config.rules import resolve_world
from megallama.config.schema import Config, WandbConfig
from megallama.data.dataset import Dataset, prepare
from megallama.observe.wandb_mode import find_wandb
from megallama.train.identity import identity_problems

APEX_EXTENSIONS = {"rms_norm": "fused_layer_norm_cuda", "adamw": "amp_C"}
LARGEST_HEAD = 256
HOPPER = 9


@dataclass(frozen=True)
class Prepared:
    """A run that may start."""

    config: Config
    """With the world filled in."""
    dataset: Dataset


def prepare_run(config: Config, world_size: int) -> Prepared:
    """Check a run against this version, this machine and its data.

    Raises:
        UserError: with every problem found.

    """
    config = resolve_world(config, world_size)
    problems = [
        *_device_problems(),
        *_overlap_problems(config),
        *_kernel_problems(config),
        *_attention_problems(config),
        *_folder_problems(Path(config.run)),
        *_wandb_problems(config.metrics.wandb),
    ]
    if problems:
        raise UserError(problems)
    dataset = prepare(config.data, config.train.seed, config.model.vocab)
    if problems := identity_problems(config, dataset):
        raise UserError(problems)
    return Prepared(config, dataset)


def _device_problems() -> list[Problem]:
    problems = []
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    bound = "LOCAL_WORLD_SIZE" not in os.environ  # by srun: each task may see one GPU, its own
    if torch.cuda.is_available() and not bound and local > torch.cuda.device_count():
        problems.append(
            Problem(
                "layout",
                f"{local} processes on this machine, which has {torch.cuda.device_count()} GPUs: "
                "start one process for each GPU, or set CUDA_VISIBLE_DEVICES= to train on CPU",
            )
        )
    return problems


def _overlap_problems(config: Config) -> list[Problem]:
    tensor = config.layout.tensor
    if not config.layout.tensor_overlap or tensor == 1:
        return []
    local = int(os.environ.get("LOCAL_WORLD_SIZE", tensor))
    if not torch.cuda.is_available():
        why = "this machine has none"
    elif local % tensor:
        why = f"{local} processes a machine leave layout.tensor = {tensor} on several"
    else:
        return []
    what = f"true needs GPUs that see each other's memory, and {why}"
    return [Problem("layout.tensor_overlap", f"{what}: leave it out, or set it to false")]


def _kernel_problems(config: Config) -> list[Problem]:
    """Kernels that were asked for and cannot run here."""
    problems = []
    on_gpu, installed = torch.cuda.is_available(), find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and installed
    for operation, asked in config.kernels:
        if asked == "triton" and not (on_gpu or interpreted):
            problem = "triton needs a GPU, and this machine has none: leave it out, or take torch"
        elif asked == "triton" and not installed:
            problem = "triton is not installed: pip install triton"
        elif asked == "apex" and find_spec(APEX_EXTENSIONS[operation]) is None:
            problem = (
                "apex is not installed with its CUDA extensions: build it from NVIDIA's source "
                "(github.com/NVIDIA/apex; the package of that name on PyPI is another), or leave "
                "it out"
            )
        elif asked == "fa3" and not (on_gpu and torch.cuda.get_device_capability()[0] == HOPPER):
            problem = "fa3 needs a Hopper GPU, and this machine has none: leave it out"
        elif asked == "fa3" and find_spec("flash_attn_interface") is None:
            problem = (
                "FlashAttention 3 is not installed: build it from the folder hopper of "
                "github.com/Dao-AILab/flash-attention, or leave it out"
            )
        else:
            continue
        problems.append(Problem(f"kernels.{operation}", problem))
    return problems


def _attention_problems(config: Config) -> list[Problem]:
    """Without a fused kernel a GPU would write out the scores."""
    size, bf16 = config.model.head_dim, config.train.precision == "bf16"
    if not (torch.cuda.is_available() and bf16) or (size % 8 == 0 and size <= LARGEST_HEAD):
        return []
    what = f"{size}: fused attention on GPUs takes multiples of 8 up to {LARGEST_HEAD}"
    return [Problem("model.head_dim", f"{what}: use one of these")]


def _folder_problems(run: Path) -> list[Problem]:
    """The run folder is made, and a file written to it and removed."""
    probe = run / f".write-test-{os.getpid()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        return [
            Problem(
                "run",
                f"{str(run)!r} cannot be written ({reason}): "
                "name a folder you may write, such as runs/mine",
            )
        ]
    return []


def _wandb_problems(config: WandbConfig) -> list[Problem]:
    if config.mode == "auto":  # takes what there is, and is slow to import
        return []
    try:
        find_wandb(config)
    except UserError as error:
        return list(error.problems)
    return []
