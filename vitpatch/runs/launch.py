"""Where a launcher from outside (torchrun, srun) put this process. Light: no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Process ``rank`` of ``world``, the ``local_rank``-th of its machine, all from 0."""

    rank: int
    world: int
    local_rank: int


def place() -> Place | None:
    """This process's place among several that were started together; ``None`` where it was started alone."""
    names = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_NUM_TASKS" in os.environ:  # of srun; a batch script that calls python itself has none
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if names is None:
        return None
    found = Place(*(int(os.environ[name]) for name in names))
    return found if found.world > 1 else None


def is_follower() -> bool:
    """Whether another process leads: it alone writes what is not a shard."""
    found = place()
    return found is not None and found.rank > 0
