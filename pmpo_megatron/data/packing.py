"""Trajectories -> the tensors of a micro-batch, packed one after another; and -> one array to send, and back.

Legend: T packed tokens, N trajectories of a micro-batch, S sequences (one of padding where there is no trajectory).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pmpo_megatron.types import Float32s, Float64s, Integers, PackedTrajectories, Sample, TokenIds, TrajectoryTable
from pmpo_megatron.units import round_up

Bytes = npt.NDArray[np.uint8]  # gloo does not send booleans
PADDING = 0  # a token of no meaning: no target, and no trajectory attends to it


def pack(
    samples: Sequence[Sample],
    weights_N: Float64s | Sequence[float],
    *,
    sequence_multiple: int,
    group_statistics: Mapping[str, Float64s] | None = None,
) -> PackedTrajectories:
    """One micro-batch of ``samples`` with their weights c_i; of padding only where there are none.

    Args:
        group_statistics: of the samples' groups, [N] each, by name.
        sequence_multiple: every sequence is padded to it (`parallel.shards.sequence_multiple`).
    """
    token_ids = [np.concatenate([sample.prompt_ids, sample.response_ids]) for sample in samples]
    lengths = [round_up(max(len(ids), 1), sequence_multiple) for ids in token_ids] or [sequence_multiple]
    boundaries = tuple(np.cumsum([0, *lengths]).tolist())
    tokens = np.full(boundaries[-1], PADDING, dtype=np.int64)
    targets, trajectory = np.zeros_like(tokens), np.full_like(tokens, -1)
    rollout_log_probs = np.zeros(boundaries[-1], dtype=np.float32)
    for number, (sample, ids, start) in enumerate(zip(samples, token_ids, boundaries, strict=False)):
        tokens[start : start + len(ids)] = ids
        targets[start : start + len(ids) - 1] = ids[1:]
        # The token before the first response token predicts it; the last response token predicts nothing of ours.
        first = start + len(sample.prompt_ids) - 1
        last = first + len(sample.response_ids)
        trajectory[first:last] = number if sample.sampled is None else np.where(sample.sampled, number, -1)
        rollout_log_probs[first:last] = sample.rollout_log_probs
    return PackedTrajectories(
        tokens_T=torch.from_numpy(tokens),
        targets_T=torch.from_numpy(targets),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        trajectory_T=torch.from_numpy(trajectory),
        rollout_log_probs_T=torch.from_numpy(rollout_log_probs),
        boundaries=boundaries,
        advantages_N=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
        weights_N=torch.tensor(np.asarray(weights_N), dtype=torch.float32),
        group_statistics={name: torch.from_numpy(values_N) for name, values_N in (group_statistics or {}).items()},
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def flatten(samples: Sequence[Sample]) -> tuple[TokenIds, Float32s, Bytes]:
    """(token ids of prompts and responses, log-probs of the responses, which of their tokens were sampled), sample by sample.

    A response whose tokens were all sampled has no part in the third.
    """
    ids = [ids for sample in samples for ids in (sample.prompt_ids, sample.response_ids)]
    log_probs = [sample.rollout_log_probs for sample in samples]
    sampled = [sample.sampled for sample in samples if sample.sampled is not None and not sample.sampled.all()]
    return (
        np.concatenate([*ids, np.empty(0, np.int32)]),
        np.concatenate([*log_probs, np.empty(0, np.float32)]),
        np.concatenate([*sampled, np.empty(0, np.bool_)]).view(np.uint8),
    )


def flat_sizes(members: Integers, table: TrajectoryTable) -> tuple[int, int, int]:
    """Lengths of the arrays that `flatten` makes of the trajectories ``members``."""
    marked = int(_marked_lengths(members, table).sum())
    return int(table.lengths_N[members].sum()), int(table.response_lengths_N[members].sum()), marked


def _marked_lengths(members: Integers, table: TrajectoryTable) -> Integers:
    """Tokens of each response that has told ones among them, 0 for the others."""
    responses = table.response_lengths_N[members]
    return np.where(table.sampled_lengths_N[members] < responses, responses, 0)


def unflatten(
    token_ids: TokenIds, log_probs: Float32s, sampled: Bytes, members: Integers, table: TrajectoryTable
) -> list[Sample]:
    """The samples ``members`` from what `flatten` made of them: views, no copies."""
    prompts, responses = table.prompt_lengths_N[members], table.response_lengths_N[members]
    ids = np.split(token_ids, np.cumsum(np.stack([prompts, responses], axis=1)))[:-1]
    parts = np.split(log_probs, np.cumsum(responses))[:-1]
    marks = np.split(sampled.view(np.bool_), np.cumsum(_marked_lengths(members, table)))[:-1]
    return [
        Sample(
            sample_id=number,
            group_id=int(table.group_ids_N[number]),
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            rollout_log_probs=part,
            truncated=bool(table.truncated_N[number]),
            advantage=float(table.advantages_N[number]),
            sampled=mark if len(mark) else None,
        )
        for number, prompt_ids, response_ids, part, mark in zip(
            members.tolist(), ids[::2], ids[1::2], parts, marks, strict=True
        )
    ]
