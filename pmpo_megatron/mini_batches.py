"""A round's samples -> one list of weighted samples for each optimizer step -> packed micro-batches for this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pmpo_megatron.algo.advantages import trajectory_weights
from pmpo_megatron.types import Sample


def split_into_steps(samples: Sequence[Sample], *, steps: int, seed: int, round_index: int) -> list[list[Sample]]:
    """The samples of each optimizer step: whole groups, in an order that depends on seed and round alone.

    Args:
        samples: a round's trajectories, group after group.
        steps: optimizer steps of the round; divides the number of groups.
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    ids = list(groups)
    order = np.random.default_rng([seed, round_index]).permutation(len(ids))
    return [[sample for i in share for sample in groups[ids[i]]] for share in np.array_split(order, steps)]


def weigh(samples: Sequence[Sample], *, kind: str, max_length: int, mask_truncated: bool) -> list[Sample]:
    """``samples`` of one optimizer step with c_i set (docs/objective.md, "Settings"): the step's only denominator.

    A truncated response gets weight 0 if ``mask_truncated``; it still counts in N, so that masking some responses does
    not make the others bolder.
    """
    weights = trajectory_weights([len(s.response_ids) for s in samples], kind, max_length=max_length)
    return [
        replace(sample, weight=0.0 if mask_truncated and sample.truncated else float(weight))
        for sample, weight in zip(samples, weights, strict=True)
    ]
