"""Which trajectory goes where: a round -> optimizer steps -> data-parallel replicas -> micro-batches, by number alone.

Everything here is computed from lengths and groups, so every rank computes the same without a tensor of the others' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pmpo_megatron.algo.advantages import STATISTICS, group_statistics, trajectory_weights
from pmpo_megatron.errors import DataError
from pmpo_megatron.types import Float64s, Integers, TrajectoryTable
from pmpo_megatron.units import round_up

Split = list[list[Integers]]  # of a step: for every data-parallel replica, the trajectories of each of its micro-batches


def split_into_steps(table: TrajectoryTable, *, steps: int, seed: int, round_index: int) -> list[Integers]:
    """The trajectories of each optimizer step: whole groups, in an order that depends on seed and round alone.

    Args:
        steps: optimizer steps of the round; divides the number of groups.
    """
    by_group = np.argsort(table.group_ids_N, kind="stable")
    groups = np.split(by_group, np.flatnonzero(np.diff(table.group_ids_N[by_group])) + 1)
    order = np.random.default_rng([seed, round_index]).permutation(len(groups))
    return [np.concatenate([groups[i] for i in share]) for share in np.array_split(order, steps)]


def split_step(
    members: Integers,
    table: TrajectoryTable,
    *,
    max_tokens: int,
    replicas: int,
    sequence_multiple: int,
    micro_batch_multiple: int = 1,
) -> Split:
    """The micro-batches of every data-parallel replica, for the optimizer step on the trajectories ``members``.

    Every replica gets the same number of micro-batches, which the pipeline schedule needs; where trajectories run out, a
    micro-batch has none.

    Args:
        max_tokens: padded tokens of a micro-batch at most.
        sequence_multiple: every sequence is padded to it (`parallel.shards.sequence_multiple`).
        micro_batch_multiple: the number of micro-batches is a multiple of it (interleaved pipelines).

    Raises:
        DataError: a trajectory is longer than ``max_tokens``.
    """
    sizes = [round_up(max(length, 1), sequence_multiple) for length in table.lengths_N[members].tolist()]
    for number, size in zip(members.tolist(), sizes, strict=True):
        if size > max_tokens:
            raise DataError(
                f"trajectory {number} has {size} tokens with padding, a micro-batch at most {max_tokens}: raise "
                "batch.max_tokens_per_micro_batch, or lower sampling.max_tokens or data.max_prompt_tokens"
            )
    bins = _fill(sizes, max_tokens, replicas * micro_batch_multiple)
    # Longest first, dealt back and forth, so that the replicas' n-th micro-batches are of like size and their sums too.
    bins.sort(key=lambda places: -sum(sizes[i] for i in places))
    dealt: Split = [[] for _ in range(replicas)]
    for number, places in enumerate(bins):
        turn, place = divmod(number, replicas)
        dealt[place if turn % 2 == 0 else replicas - 1 - place].append(members[places])
    return dealt


def _fill(sizes: Sequence[int], max_tokens: int, multiple: int) -> list[list[int]]:
    """Places in ``sizes`` of each bin: the least number of bins (a multiple of ``multiple``) that best-fit-decreasing finds.

    Trajectories go, longest first, to the emptiest bin, which balances; the number of bins rises until all fit.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    count = round_up(max(1, -(-sum(sizes) // max_tokens)), multiple)
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = np.zeros(count, dtype=np.int64)
        for i in order:
            emptiest = int(loads.argmin())
            if loads[emptiest] + sizes[i] > max_tokens:
                break
            bins[emptiest].append(i)
            loads[emptiest] += sizes[i]
        else:
            return bins
        count += multiple


def step_weights(
    steps: Sequence[Integers], table: TrajectoryTable, *, kind: str, max_length: int, mask_truncated: bool
) -> Float64s:
    """c_i of every trajectory of the round [N] (docs/objective.md, "The formulas"): each step's only denominator.

    A truncated response gets weight 0 if ``mask_truncated``; it still counts in N, so that masking some responses does
    not make the others bolder.
    """
    weights_N = np.zeros(len(table.lengths_N))
    for members in steps:
        weights_N[members] = trajectory_weights(table.sampled_lengths_N[members].tolist(), kind, max_length=max_length)
    return np.where(table.truncated_N, 0.0, weights_N) if mask_truncated else weights_N


def statistics_of_groups(table: TrajectoryTable) -> dict[str, Float64s]:
    """What rules may know of the group of every trajectory of the round, by name: [N] each."""
    columns = {name: np.zeros(len(table.rewards_N)) for name in STATISTICS}
    for group in np.unique(table.group_ids_N):
        members = table.group_ids_N == group
        for name, value in group_statistics(table.rewards_N[members]).items():
            columns[name][members] = value
    return columns
