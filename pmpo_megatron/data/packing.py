"""Trajectories -> the tensors of a micro-batch, packed one after another; and -> one array to send, and back.

Legend: T packed tokens, N trajectories of a micro-batch, S sequences (one of padding where there is no trajectory).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pmpo_megatron.types import Float64s, Integers, PackedTrajectories, RouteFormat, Sample, TrajectoryTable
from pmpo_megatron.units import round_up

PADDING = 0  # a token of no meaning: no target, and no trajectory attends to it


def pack(
    samples: Sequence[Sample],
    weights_N: Float64s | Sequence[float],
    *,
    sequence_multiple: int,
    group_statistics: Mapping[str, Float64s] | None = None,
    routes: RouteFormat | None = None,
) -> PackedTrajectories:
    """One micro-batch of ``samples`` with their weights c_i; of padding only where there are none.

    Args:
        group_statistics: of the samples' groups, [N] each, by name.
        sequence_multiple: every sequence is padded to it (`parallel.shards.sequence_multiple`).
        routes: the format of the samples' routes; None: they have none, or none that are wanted.
    """
    token_ids = [np.concatenate([sample.prompt_ids, sample.response_ids]) for sample in samples]
    lengths = [round_up(max(len(ids), 1), sequence_multiple) for ids in token_ids] or [sequence_multiple]
    boundaries = tuple(np.cumsum([0, *lengths]).tolist())
    tokens = np.full(boundaries[-1], PADDING, dtype=np.int64)
    targets, trajectory = np.zeros_like(tokens), np.full_like(tokens, -1)
    padding, rollout_log_probs = np.ones_like(tokens, dtype=np.bool_), np.zeros(boundaries[-1], dtype=np.float32)
    experts = None if routes is None else routes.whole(np.empty((0, routes.layers, routes.per_token)), boundaries[-1])
    for number, (sample, ids, start) in enumerate(zip(samples, token_ids, boundaries, strict=False)):
        tokens[start : start + len(ids)] = ids
        targets[start : start + len(ids) - 1] = ids[1:]
        padding[start : start + len(ids)] = False
        if experts is not None:
            experts[start : start + len(ids)] = sample.routes
        # The token before the first response token predicts it; the last response token predicts nothing of ours.
        first = start + len(sample.prompt_ids) - 1
        last = first + len(sample.response_ids)
        trajectory[first:last] = number if sample.sampled is None else np.where(sample.sampled, number, -1)
        rollout_log_probs[first:last] = sample.rollout_log_probs
    return PackedTrajectories(
        tokens_T=torch.from_numpy(tokens),
        targets_T=torch.from_numpy(targets),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        padding_T=torch.from_numpy(padding),
        trajectory_T=torch.from_numpy(trajectory),
        rollout_log_probs_T=torch.from_numpy(rollout_log_probs),
        boundaries=boundaries,
        advantages_N=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
        weights_N=torch.tensor(np.asarray(weights_N), dtype=torch.float32),
        group_statistics={name: torch.from_numpy(values_N) for name, values_N in (group_statistics or {}).items()},
        sample_ids=tuple(sample.sample_id for sample in samples),
        routes_T=None if experts is None else torch.from_numpy(experts),
    )


def flatten(samples: Sequence[Sample], routes: RouteFormat | None = None) -> list[np.ndarray]:
    """Token ids of prompts and responses, log-probs of the responses, which of their tokens were sampled (a response whose
    tokens all were has no part in it) and, if wanted, the bytes of ``routes``; each sample by sample."""
    ids = [ids for sample in samples for ids in (sample.prompt_ids, sample.response_ids)]
    log_probs = [sample.rollout_log_probs for sample in samples]
    sampled = [sample.sampled for sample in samples if sample.sampled is not None and not sample.sampled.all()]
    arrays = [
        np.concatenate([*ids, np.empty(0, np.int32)]),
        np.concatenate([*log_probs, np.empty(0, np.float32)]),
        np.concatenate([*sampled, np.empty(0, np.bool_)]).view(np.uint8),  # gloo does not send booleans
    ]
    if routes is not None:
        parts = [sample.routes for sample in samples if sample.routes is not None]
        arrays.append(np.concatenate([*(part.reshape(-1) for part in parts), np.empty(0, routes.dtype)]).view(np.uint8))
    return arrays


def flat_like(members: Integers, table: TrajectoryTable, routes: RouteFormat | None = None) -> list[tuple[int, npt.DTypeLike]]:
    """(length, type) of the arrays that `flatten` makes of the trajectories ``members``."""
    tokens, responses = int(table.lengths_N[members].sum()), int(table.response_lengths_N[members].sum())
    marked = int(_marked_lengths(members, table).sum())
    like: list[tuple[int, npt.DTypeLike]] = [(tokens, np.int32), (responses, np.float32), (marked, np.uint8)]
    return like if routes is None else [*like, (tokens * routes.token_bytes, np.uint8)]


def _marked_lengths(members: Integers, table: TrajectoryTable) -> Integers:
    """Tokens of each response that has told ones among them, 0 for the others."""
    responses = table.response_lengths_N[members]
    return np.where(table.sampled_lengths_N[members] < responses, responses, 0)


def unflatten(
    arrays: Sequence[np.ndarray], members: Integers, table: TrajectoryTable, routes: RouteFormat | None = None
) -> list[Sample]:
    """The samples ``members`` from what `flatten` made of them: views, no copies."""
    prompts, responses = table.prompt_lengths_N[members], table.response_lengths_N[members]
    ids = np.split(arrays[0], np.cumsum(np.stack([prompts, responses], axis=1)))[:-1]
    log_probs = np.split(arrays[1], np.cumsum(responses))[:-1]
    marks = np.split(arrays[2].view(np.bool_), np.cumsum(_marked_lengths(members, table)))[:-1]
    chosen: Sequence[np.ndarray | None] = [None] * len(members)
    if routes is not None:
        tokens = arrays[3].view(routes.dtype).reshape(-1, routes.layers, routes.per_token)
        chosen = np.split(tokens, np.cumsum(table.lengths_N[members]))[:-1]
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
            routes=experts,
        )
        for number, prompt_ids, response_ids, part, mark, experts in zip(
            members.tolist(), ids[::2], ids[1::2], log_probs, marks, chosen, strict=True
        )
    ]
