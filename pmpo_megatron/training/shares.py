"""Every rank's share of a round: from the trajectories that rank 0 collected to prepared micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pmpo_megatron.data.packing import flat_like, flatten, pack, unflatten
from pmpo_megatron.data.split import Split, split_into_steps, split_step, statistics_of_groups, step_weights
from pmpo_megatron.model.micro_batch import MicroBatch, prepare
from pmpo_megatron.parallel.scatter import scatter_to_replicas
from pmpo_megatron.parallel.shards import sequence_multiple
from pmpo_megatron.parallel.state import ParallelState
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.types import Integers, RouteFormat, Sample, TrajectoryTable


def share_round(
    samples: Sequence[Sample],
    table: TrajectoryTable,
    config: RunConfig,
    state: ParallelState,
    *,
    round_index: int,
    routes: RouteFormat | None = None,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of every optimizer step, prepared. Every rank computes the same split. Collective.

    Args:
        samples: all of the round on rank 0, which sends the other ranks theirs; not looked at elsewhere.
        table: of all of them, on every rank.
        routes: the format of the samples' routes, if these are replayed.
    """
    multiple = sequence_multiple(config.parallel)
    steps = split_into_steps(table, steps=config.batch.steps_per_round, seed=config.run.seed, round_index=round_index)
    splits = [
        split_step(
            members,
            table,
            max_tokens=config.batch.max_tokens_per_micro_batch,
            replicas=state.dp_size,
            sequence_multiple=multiple,
            micro_batch_multiple=state.pp_size if config.parallel.virtual_pipeline else 1,
        )
        for members in steps
    ]
    weights_N = step_weights(
        steps,
        table,
        kind=config.objective.trajectory_weight,
        max_length=config.sampling.max_tokens,
        mask_truncated=config.batch.mask_truncated,
    )
    statistics = statistics_of_groups(table)
    mine = share_samples(samples, table, splits, state, routes)

    def make(members: Integers) -> MicroBatch:
        packed = pack(
            [mine[i] for i in members.tolist()],
            weights_N[members],
            sequence_multiple=multiple,
            group_statistics={name: values_N[members] for name, values_N in statistics.items()},
            routes=routes,
        )
        return prepare(packed, state)

    return [[make(members) for members in split[state.dp_rank]] for split in splits]


def share_samples(
    samples: Sequence[Sample],
    table: TrajectoryTable,
    splits: Sequence[Split],
    state: ParallelState,
    routes: RouteFormat | None = None,
) -> dict[int, Sample]:
    """The samples of this rank's data-parallel replica by their number; rank 0 keeps all. Collective."""
    members_of = [np.concatenate([part for split in splits for part in split[replica]]) for replica in range(state.dp_size)]
    received = scatter_to_replicas(
        lambda replica: flatten([samples[i] for i in members_of[replica].tolist()], routes),
        flat_like(members_of[state.dp_rank], table, routes),
        state,
    )
    mine = samples if state.is_main else unflatten(received, members_of[state.dp_rank], table, routes)
    return {sample.sample_id: sample for sample in mine}
