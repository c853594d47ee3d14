"""Arrays of rank 0 to the data-parallel replicas, each of which gets what is its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pmpo_megatron.parallel.liveness import naming_ranks
from pmpo_megatron.parallel.state import ParallelState

Array = npt.NDArray[Any]


def scatter_to_replicas(
    arrays_of: Callable[[int], Sequence[Array]], like: Sequence[tuple[int, npt.DTypeLike]], state: ParallelState
) -> list[Array]:
    """What rank 0's ``arrays_of`` gives for this rank's data-parallel replica; nothing on rank 0, which has it. Collective.

    Rank 0 holds the arrays of one replica at a time, and every other rank those of its own alone.

    Args:
        arrays_of: the arrays of a replica, in one dimension; called on rank 0 only.
        like: (length, dtype) of each of the arrays that this rank gets.
    """
    with naming_ranks("the trajectories from rank 0"):
        if not state.is_main:
            received: list[Array] = [np.empty(length, dtype=dtype) for length, dtype in like]
            for array in filter(len, received):
                dist.recv(torch.from_numpy(array), src=0, group=state.control_group)
            return received
        for replica in range(state.dp_size):
            others = [rank for rank in state.ranks_of_replica(replica) if rank != state.rank]
            for array in filter(len, arrays_of(replica) if others else ()):
                for rank in others:
                    dist.send(torch.from_numpy(array), dst=rank, group=state.control_group)
    return []
