"""Where this process stands: started by torchrun, by srun, by `megallama train`, or by hand."""

import os
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megallama.config.errors import UserError

STORE = "MEGALLAMA_STORE"
"""Path of the file through which the ranks of `megallama train` alone find each other."""


@dataclass(frozen=True)
class Place:
    """This process among those of the run."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def speaks_for_node(self) -> bool:
        """One process a node shows what all of its processes would."""
        return self.local_rank == 0


def find_place(env: Mapping[str, str]) -> Place | None:
    """This process's place, or None if it was started alone.

    Raises:
        UserError: the variables of a launcher are there but incomplete.

    """
    if "RANK" in env:
        return _from(env, "RANK", "LOCAL_RANK", "WORLD_SIZE")
    if _is_srun_task(env):
        return _from(env, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    return None


def set_rendezvous(env: MutableMapping[str, str], place: Place) -> None:
    """Fill in what torch.distributed reads, where srun left it out."""
    if "RANK" in env:
        return
    env["RANK"], env["WORLD_SIZE"] = str(place.rank), str(place.world_size)
    env["LOCAL_RANK"] = str(place.local_rank)
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_node_address(env["SLURM_STEP_NODELIST"])
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
    env.setdefault("MASTER_PORT", str(20_000 + (job * 16 + step) % 10_000))


def _is_srun_task(env: Mapping[str, str]) -> bool:
    # Inside an allocation but outside of srun, SLURM_PROCID is 0 and there is no step to speak of.
    return "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env


def _from(env: Mapping[str, str], rank: str, local_rank: str, world_size: str) -> Place:
    try:
        return Place(int(env[rank]), int(env.get(local_rank, 0)), int(env[world_size]))
    except (KeyError, ValueError) as error:
        raise UserError.one(
            "environment",
            f"{rank} is set, but {world_size} is missing or one of them is not a number "
            f"({error}): start with torchrun, srun, or none of them",
        ) from error


def _first_node_address(nodes: str) -> str:
    """Address of the first node of a list like `node[3-6]`; node names need not resolve."""
    name = _scontrol("show", "hostnames", nodes).split()[0]
    details = dict(
        item.split("=", 1) for item in _scontrol("show", "node", name, "-o").split() if "=" in item
    )
    return details.get("NodeAddr", name)


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["scontrol", *arguments], check=True, capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError.one(
            "environment", f"scontrol did not say where rank 0 is ({error}): set MASTER_ADDR"
        ) from error


def restart_number() -> int:
    """How often torchrun has restarted this job's workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
