"""Which tokens of old rollouts are trusted: those whose probability the trainer and the engine that sampled them agree on.

A mask of the gradient, as IcePop's (tokens) and rollout correction's in verl (tokens and sequences).
Legend: N trajectories, T tokens on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pmpo_megatron.algo.importance import log_weights


@dataclass(frozen=True)
class Rejection:
    """Ratios trainer / engine from ``low`` to ``high`` are kept, of each token, or of a sequence's mean; level none: all."""

    level: str
    low: float
    high: float

    def kept_tokens(
        self,
        old_log_probs_T: torch.Tensor,
        rollout_log_probs_T: torch.Tensor,
        trajectory_T: torch.Tensor,
        num_trajectories: int,
        sum_over_shards: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> torch.Tensor | None:
        """bool [T], true where there is no response token; None for level none.

        ``token``: low <= exp(old - rollout) <= high. ``sequence``: the same of the exponential of the mean over the
        trajectory's tokens, for all of them. The sequence level makes one collective.
        """
        if self.level == "none":
            return None
        log_weight_T = log_weights(
            old_log_probs_T,
            rollout_log_probs_T,
            trajectory_T,
            num_trajectories,
            level=self.level,
            sum_over_shards=sum_over_shards,
        )
        inside_T = (log_weight_T >= math.log(self.low)) & (log_weight_T <= math.log(self.high))
        return inside_T | (trajectory_T < 0)
