"""Collectives outside Megatron's own: each names its group, and its gradient where tensors have one.

All of them run inside `naming_ranks`, so that a rank that died or stalled ends the wait of the others with an error that
says which rank it was and what it was last seen doing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pmpo_megatron.parallel.liveness import naming_ranks, wait_for_key
from pmpo_megatron.parallel.state import ParallelState


def sum_over(group: dist.ProcessGroup) -> Callable[[torch.Tensor], torch.Tensor]:
    """All-reduce (SUM) over ``group`` as a function of a tensor. No gradient: for statistics, on detached tensors."""

    def reduce(values: torch.Tensor) -> torch.Tensor:
        if group.size() == 1:
            return values
        result = values.detach().clone()
        with naming_ranks("a sum over shards"):
            dist.all_reduce(result, group=group)
        return result

    return reduce


def any_rank(flag: bool, state: ParallelState) -> bool:
    """Whether ``flag`` is true on at least one rank; the same answer on every rank."""
    if state.world_size == 1:
        return bool(flag)
    value = torch.tensor(int(bool(flag)))
    with naming_ranks("an agreement of all ranks"):
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=state.control_group)
    return bool(value.item())


def broadcast_object(value: Any, state: ParallelState, *, source: int = 0, timeout_s: float | None = None) -> Any:
    """``value`` of rank ``source`` on every rank. Objects are pickled: only between the ranks of one run.

    The others may wait long (rollouts are generated meanwhile): as long as ``source`` lives, at most ``timeout_s``
    (None: no limit), which does not count against the time-out of collectives.

    Raises:
        RankFailure: ``source`` died, stalled, or took longer than ``timeout_s``.
    """
    if state.world_size == 1:
        return value
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL) if state.rank == source else b""
    wait_for_key("broadcast", mine=state.rank == source, source=source, timeout_s=timeout_s)
    size = torch.tensor(len(data))
    with naming_ranks(f"a broadcast from rank {source}"):
        dist.broadcast(size, src=source, group=state.control_group)
        if state.rank == source:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            buffer = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(buffer, src=source, group=state.control_group)
    return value if state.rank == source else pickle.loads(buffer.numpy().tobytes())


def gather_objects(value: Any, state: ParallelState) -> list[Any]:
    """Every rank's ``value`` in rank order, on every rank."""
    if state.world_size == 1:
        return [value]
    results: list[Any] = [None] * state.world_size
    with naming_ranks("a gather from all ranks"):
        dist.all_gather_object(results, value, group=state.control_group)
    return results


def barrier(state: ParallelState, what: str) -> None:
    """Waits until every rank has come to ``what``.

    Raises:
        RankFailure: names the ranks that did not come within the time-out.
    """
    if state.world_size == 1:
        return
    with naming_ranks(what):
        dist.all_reduce(torch.zeros(1), group=state.control_group)
