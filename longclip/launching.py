"""Who started this process, and as which of how many: srun, torchrun or Kubernetes, or nobody.

Rank variables win (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: torchrun
sets them, a Kubernetes manifest spells them out), then those of a SLURM step. Without either this
is one process, which may start others on its own machine. The trainer's YAML asks here, so that one
command line fits a laptop and four nodes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from .types import UserError

NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """This process among all: `local` counts on its machine; `by` is who started it."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    by: str

    @property
    def nodes(self) -> int:
        return self.world // self.local_world


ALONE = Place(0, 1, 0, 1, "nobody")


def place(env: Mapping[str, str] = os.environ) -> Place:
    """Read the variables of whoever started this process.

    Raises:
        UserError: some of the rank variables are set and others are not, or they contradict each other.
    """
    if "RANK" in env:
        return _by_rank_variables(env)
    # A batch script and salloc's shell have the job's variables, but only srun numbers a step's tasks.
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") != "interactive":
        world, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_STEP_NUM_NODES"])
        return Place(int(env["SLURM_PROCID"]), world, int(env["SLURM_LOCALID"]), world // nodes, "srun")
    return ALONE


def _by_rank_variables(env: Mapping[str, str]) -> Place:
    absent = [name for name in NEEDED if name not in env]
    if absent:
        raise UserError(f"RANK={env['RANK']} is set but {', '.join(absent)} is not: set all or none")
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    local_rank, local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    if not (rank < world and local_rank < local_world and world % local_world == 0):
        raise UserError(
            f"RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_world} "
            "do not fit together; LOCAL_WORLD_SIZE is the number of processes on this machine (1 if not set)"
        )
    return Place(rank, world, local_rank, local_world, "rank variables")


def devices(otherwise: int | str) -> int | str:
    """Processes on this machine: one per task that was started here, else `otherwise`."""
    here = place()
    return otherwise if here is ALONE else here.local_world


def nodes() -> int:
    """Machines that take part."""
    return place().nodes


def plugins() -> list[Any]:
    """Lightning's reader of the same variables, named so that it does not guess.

    Guessing, it takes torchrun inside a SLURM job and a shell opened by salloc for srun, ignores rank
    variables that torchrun did not set, and requeues from within a signal handler.
    """
    from lightning.fabric.plugins.environments import (
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )

    by = place().by
    if by == "srun":
        return [SLURMEnvironment(auto_requeue=False)]
    if by == "rank variables":
        os.environ.setdefault("LOCAL_RANK", "0")  # Lightning reads it without asking
        return [TorchElasticEnvironment()]
    return [LightningEnvironment()]
