"""The gap between the rollout engine's log-probs and the trainer's: measured, and corrected by truncated importance sampling.

Legend: N trajectories, T tokens on this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pmpo_megatron.algo.sums import LOG_RATIO_LIMIT

MISMATCH = ("tokens", "sum_abs", "sum_k1", "sum_k3", "outside")


def importance_weights(
    old_log_probs_T: torch.Tensor,
    rollout_log_probs_T: torch.Tensor,
    trajectory_T: torch.Tensor,
    num_trajectories: int,
    *,
    level: str,
    cap: float,
    sum_over_shards: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor | None:
    """Detached weights [T] for `evaluate_objective`, or None for level ``none``.

    ``token``: min(exp(old - rollout), cap) for each token. ``sequence``: min(exp(mean over the trajectory's tokens of
    old - rollout), cap), the same for all tokens of a trajectory - the mean, because the sum over thousands of tokens is
    0 or the cap. The sequence level makes one collective.
    """
    if level == "none":
        return None
    log_weight_T = log_weights(
        old_log_probs_T, rollout_log_probs_T, trajectory_T, num_trajectories, level=level, sum_over_shards=sum_over_shards
    )
    return torch.where(trajectory_T >= 0, torch.exp(log_weight_T).clamp(max=cap), 1.0)


def log_weights(
    old_log_probs_T: torch.Tensor,
    rollout_log_probs_T: torch.Tensor,
    trajectory_T: torch.Tensor,
    num_trajectories: int,
    *,
    level: str,
    sum_over_shards: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """old - rollout, detached, [T]: of each token (``token``), or its trajectory's mean (``sequence``, one collective)."""
    log_weight_T = (old_log_probs_T - rollout_log_probs_T).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if level == "sequence":
        segment_T = torch.where(trajectory_T >= 0, trajectory_T, num_trajectories)
        sums = torch.zeros(num_trajectories + 1, 2, dtype=torch.float64, device=log_weight_T.device)
        columns = torch.stack([log_weight_T.double(), torch.ones_like(log_weight_T, dtype=torch.float64)], dim=-1)
        sums = sum_over_shards(sums.index_add_(0, segment_T, columns))
        log_weight_T = (sums[:, 0] / sums[:, 1].clamp(min=1))[segment_T].to(log_weight_T.dtype)
    return log_weight_T


def mismatch_sums(
    trainer_log_probs_T: torch.Tensor,
    rollout_log_probs_T: torch.Tensor,
    trajectory_T: torch.Tensor,
    log_bounds: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums in the order of `MISMATCH`, largest |difference|), float64: additive over tokens, and a maximum.

    Divided by ``tokens``: mean |trainer - rollout|; the KL from rollout to trainer by its k1 (-log ratio) and k3
    (ratio - 1 - log ratio) estimators; the fraction of tokens whose ratio lies outside the clip bounds before any update.
    """
    response_T = trajectory_T >= 0
    difference_T = torch.where(response_T, trainer_log_probs_T.detach() - rollout_log_probs_T, 0.0).double()
    low, high = log_bounds
    outside_T = (difference_T < low) | (difference_T > high)
    bounded_T = difference_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    sums = torch.stack(
        [
            response_T.sum().double(),
            difference_T.abs().sum(),
            -difference_T.sum(),
            (torch.expm1(bounded_T) - bounded_T).sum(),
            outside_T.sum().double(),
        ]
    )
    largest = difference_T.abs().max() if difference_T.numel() else difference_T.new_zeros(())
    return sums, largest
