"""The order p at which the effective sample size meets a target, for all trajectories at once, from their power sums.

Legend: N trajectories, G grid points.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from pmpo_megatron.algo.power_sums import PowerSums

# A trajectory whose log-ratios have this variance or less is flat: every p gives it the same value and gradient. The
# bound is above the rounding of float32 log-probs (ulp 1e-6 at -10), so that noise never decides what p is.
FLAT_VARIANCE = 2.5e-13
SECTIONS = 24  # of the interval, and then of the section that holds the target
BRACKET = 1e-4  # width in p below which a parabola is good for |n(p) - target| < 1e-9


def flat_is_one(p_N: torch.Tensor, sums: PowerSums) -> torch.Tensor:
    """p = 1 by convention where all log-ratios are equal: also T = 1, T = 0 and a step that is on-policy."""
    rounding_N = 1e-14 * (sums.mean_N**2 + sums.variance_N)
    return torch.where(sums.variance_N <= FLAT_VARIANCE + rounding_N, 1.0, p_N)


def solve_ess(sums: PowerSums, target_N: torch.Tensor, *, p_min: float, p_max: float) -> torch.Tensor:
    """p in [p_min, p_max], 0 <= p_min, with n(p) = target, float64 [N]; exactly the nearer end where there is none.

    n falls with p. Its values at the ends of SECTIONS equal sections tell in which of them the target lies; that one is divided
    again, in one batched operation for all trajectories, and again, which for p in [0, 1] leaves 7e-5 of it. There a parabola
    through the ends and the next point gives p: |n(p) - target| < 1e-9, heavy tails included. There is no branch on data,
    hence no synchronisation, and no communication: the sums hold all there is to know.
    """
    target_N1 = target_N.unsqueeze(-1)
    unit_G, width = _unit_grid(target_N.device), (p_max - p_min) / SECTIONS
    low_N1 = torch.full_like(target_N1[:1], p_min)  # the same for all trajectories, until sections are told apart
    on_grid_NG = sums.ess_fraction(low_N1 + width * unit_G)
    above_all_N, below_all_N = (on_grid_NG[:, -1:] >= target_N1), (on_grid_NG[:, :1] <= target_N1)
    index_N1 = _section(on_grid_NG, target_N1)
    while width > BRACKET:
        low_N1, width = low_N1 + width * index_N1, width / SECTIONS
        on_grid_NG = sums.ess_fraction(low_N1 + width * unit_G)
        index_N1 = _section(on_grid_NG, target_N1)
    last_N1 = index_N1.clamp(max=SECTIONS - 2)  # the parabola's three points are the grid's
    three_N3 = on_grid_NG.gather(-1, last_N1.long() + torch.arange(3, device=target_N.device)) - target_N1
    p_N1 = low_N1 + width * (last_N1 + _root(three_N3, index_N1 - last_N1))
    p_N1 = p_N1.clamp(p_min, p_max).masked_fill(below_all_N, p_min).masked_fill(above_all_N, p_max)
    return p_N1.squeeze(-1)


def _section(falling_NG: torch.Tensor, target_N1: torch.Tensor) -> torch.Tensor:
    """Index [N, 1] of the last grid point that still has more than the target, so that the target lies before the next.

    float64, because int64 times a number is float32.
    """
    return (falling_NG > target_N1).sum(-1, keepdim=True, dtype=torch.float64).sub_(1).clamp_(0, SECTIONS - 1)


def _root(values_N3: torch.Tensor, section_N1: torch.Tensor) -> torch.Tensor:
    """Where, in [section, section + 1], the parabola through the values at 0, 1, 2 falls through 0: float64 [N, 1].

    The root is written without cancellation, so that it is the straight line's where the parabola is one. The nearer end
    where there is no root, as on flat or rounding-dominated values, where every p serves.
    """
    at_0, at_1, at_2 = values_N3.chunk(3, dim=-1)
    curvature = (at_2 - 2 * at_1 + at_0) / 2
    slope = at_1 - at_0 - curvature
    root = (slope * slope - 4 * curvature * at_0).clamp(min=0).sqrt()
    divisor = root - slope
    inside = torch.where(divisor > 0, 2 * at_0 / divisor, 0.0)
    return torch.minimum(torch.maximum(inside, section_N1), section_N1 + 1)


@lru_cache(maxsize=8)
def _unit_grid(device: torch.device) -> torch.Tensor:
    return torch.arange(SECTIONS + 1, dtype=torch.float64, device=device)
