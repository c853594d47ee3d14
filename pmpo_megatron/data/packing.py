"""Trajectories -> micro-batches: whole, packed one after another under a token budget, balanced over data-parallel ranks.

Legend: T packed tokens, N trajectories of a micro-batch, S sequences (N, and one of padding where the tail needs it).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pmpo_megatron.errors import DataError
from pmpo_megatron.types import MicroBatch, Sample
from pmpo_megatron.units import round_up


def pack(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    data_parallel_size: int,
    sequence_multiple: int,
    micro_batch_multiple: int = 1,
    pad_token_id: int = 0,
) -> list[list[MicroBatch]]:
    """The micro-batches of every data-parallel rank, for one optimizer step.

    Every rank gets the same number of micro-batches, which the pipeline schedule needs; where trajectories run out, a
    micro-batch holds padding only. Depends on its arguments alone, so all ranks compute the same.

    Args:
        samples: the trajectories of the step.
        max_tokens: padded tokens of a micro-batch at most.
        sequence_multiple: every sequence is padded to it (`parallel.shards.sequence_multiple`).
        micro_batch_multiple: the number of micro-batches is a multiple of it (interleaved pipelines).

    Raises:
        DataError: a trajectory is longer than ``max_tokens``.
    """
    sizes = [round_up(max(sample.num_tokens, 1), sequence_multiple) for sample in samples]
    for sample, size in zip(samples, sizes, strict=True):
        if size > max_tokens:
            raise DataError(
                f"trajectory {sample.sample_id} has {size} tokens with padding, a micro-batch at most {max_tokens}: raise "
                "batch.max_tokens_per_micro_batch, or lower sampling.max_tokens or data.max_prompt_tokens"
            )
    bins = _fill(sizes, max_tokens, data_parallel_size * micro_batch_multiple)
    # Longest first, dealt back and forth, so that the ranks' n-th micro-batches are of like size and their sums too.
    bins.sort(key=lambda members: -sum(sizes[i] for i in members))
    ranks: list[list[MicroBatch]] = [[] for _ in range(data_parallel_size)]
    for number, members in enumerate(bins):
        turn, place = divmod(number, data_parallel_size)
        rank = place if turn % 2 == 0 else data_parallel_size - 1 - place
        ranks[rank].append(make_micro_batch([samples[i] for i in members], sequence_multiple, pad_token_id))
    return ranks


def _fill(sizes: Sequence[int], max_tokens: int, multiple: int) -> list[list[int]]:
    """Members of each bin: the least number of bins (a multiple of ``multiple``) that best-fit-decreasing finds.

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


def make_micro_batch(samples: Sequence[Sample], sequence_multiple: int, pad_token_id: int) -> MicroBatch:
    """One micro-batch of ``samples``; of padding only where there are none."""
    lengths = [round_up(max(sample.num_tokens, 1), sequence_multiple) for sample in samples] or [sequence_multiple]
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    total = int(boundaries[-1])
    tokens = np.full(total, pad_token_id, dtype=np.int64)
    targets = np.zeros(total, dtype=np.int64)
    trajectory = np.full(total, -1, dtype=np.int64)
    rollout_log_probs = np.zeros(total, dtype=np.float32)
    for number, (sample, start) in enumerate(zip(samples, boundaries, strict=False)):
        ids = np.array(sample.prompt_ids + sample.response_ids, dtype=np.int64)
        tokens[start : start + len(ids)] = ids
        targets[start : start + len(ids) - 1] = ids[1:]
        # The token before the first response token predicts it; the last response token predicts nothing of ours.
        first = start + len(sample.prompt_ids) - 1
        last = first + len(sample.response_ids)
        trajectory[first:last] = number
        rollout_log_probs[first:last] = sample.rollout_log_probs
    return MicroBatch(
        tokens_T=torch.from_numpy(tokens),
        targets_T=torch.from_numpy(targets),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        trajectory_T=torch.from_numpy(trajectory),
        rollout_log_probs_T=torch.from_numpy(rollout_log_probs),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        advantages_N=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
        weights_N=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )
