"""From the statistics of a trajectory to its exponent p: one small function per rule (objective.md section 3).

A rule takes the reduced power sums and the clip fractions of all trajectories and returns p_N and, where it aims at one,
the target of the effective sample size as a fraction of the length. A new rule is one new function and a line in `RULES`.

Legend: N trajectories, G grid points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from pmpo_megatron.algo.power_sums import PowerSums

# A trajectory whose log-ratios have this variance or less is flat: every p gives it the same value and gradient. The
# bound is above the rounding of float32 log-probs (ulp 1e-6 at -10), so that noise never decides what p is.
FLAT_VARIANCE = 2.5e-13
SECTIONS = 64
ROUNDS = 3  # 64^3 = 3e5 sections of the interval; the last step interpolates inside one, with an error below 1e-10


@dataclass(frozen=True)
class ExponentRule:
    """The parameters of a rule; which of them it uses is checked by `ObjectiveConfig`."""

    name: str
    p: float = 1.0
    p_min: float = 0.0
    p_max: float = 1.0
    p_start: float = 0.0
    p_end: float = 0.0
    ess_floor: float = 0.0


def exponents(
    rule: ExponentRule, sums: PowerSums, clip_fraction_N: torch.Tensor, progress: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(p_N, target ESS fraction [N] or None), float64, without gradient. ``progress`` is training's, in [0, 1]."""
    return RULES[rule.name](rule, sums, clip_fraction_N, progress)


def _ess(rule: ExponentRule, sums: PowerSums, clip_fraction_N: torch.Tensor, progress: float):
    """n* = n(1) + (1 - n(1)) * f, p in [0, 1]: f = 0 gives exactly 1, f = 1 gives exactly 0."""
    at_one_N = torch.exp(sums.log_ess_on_grid(0.0, 1.0, SECTIONS)[:, -1])
    target_N = at_one_N + (1 - at_one_N) * clip_fraction_N
    p_N = solve_ess(sums, target_N, p_min=0.0, p_max=1.0)
    p_N = torch.where(clip_fraction_N == 0, 1.0, torch.where(clip_fraction_N == 1, 0.0, p_N))
    return _flat_is_one(p_N, sums), target_N


def _ess_floor(rule: ExponentRule, sums: PowerSums, clip_fraction_N: torch.Tensor, progress: float):
    """n* = floor + (1 - floor) * f, p clamped to [p_min, p_max]."""
    target_N = rule.ess_floor + (1 - rule.ess_floor) * clip_fraction_N
    p_N = solve_ess(sums, target_N, p_min=rule.p_min, p_max=rule.p_max)
    return _flat_is_one(p_N, sums).clamp(rule.p_min, rule.p_max), target_N


def _linear(rule: ExponentRule, sums: PowerSums, clip_fraction_N: torch.Tensor, progress: float):
    """p = p_max - (p_max - p_min) * f, the heuristic that the paper ablates."""
    return rule.p_max - (rule.p_max - rule.p_min) * clip_fraction_N, None


def _fixed(rule: ExponentRule, sums: PowerSums, clip_fraction_N: torch.Tensor, progress: float):
    return torch.full_like(clip_fraction_N, rule.p), None


def _schedule(rule: ExponentRule, sums: PowerSums, clip_fraction_N: torch.Tensor, progress: float):
    """From p_start to p_end, linear in training's progress (HoelderPO, 2605.12058)."""
    return torch.full_like(clip_fraction_N, rule.p_start + (rule.p_end - rule.p_start) * progress), None


RULES: dict[str, Callable] = {
    "ess": _ess,
    "ess_floor": _ess_floor,
    "linear": _linear,
    "fixed": _fixed,
    "schedule": _schedule,
}


def _flat_is_one(p_N: torch.Tensor, sums: PowerSums) -> torch.Tensor:
    """p = 1 by convention where all log-ratios are equal: also T = 1, T = 0 and a step that is on-policy."""
    rounding_N = 1e-14 * (sums.mean_N**2 + sums.variance_N)
    return torch.where(sums.variance_N <= FLAT_VARIANCE + rounding_N, 1.0, p_N)


def solve_ess(sums: PowerSums, target_N: torch.Tensor, *, p_min: float, p_max: float) -> torch.Tensor:
    """p in [p_min, p_max], 0 <= p_min, with n(p) = target, float64 [N]; the nearer end where there is none.

    n falls with p. Each round evaluates n at SECTIONS + 1 points of every trajectory's bracket in one batched operation
    and keeps the section in which the target lies; the last bracket, 4e-6 of the interval, is finished by the secant.
    There is no branch on data, hence no synchronisation, and no communication: the sums hold all there is to know.
    """
    grid_G = _unit_grid(target_N.device)
    log_target_N1 = torch.log(target_N.clamp(min=1e-300)).unsqueeze(-1)
    low_N1, width = torch.full_like(log_target_N1, p_min), p_max - p_min
    above_NG = sums.log_ess_on_grid(p_min, p_max, SECTIONS) - log_target_N1
    for remaining in reversed(range(ROUNDS)):
        # The last grid point that still has more than the target; the bracket reaches from it to the next.
        index_N1 = ((above_NG > 0).sum(-1, keepdim=True) - 1).clamp(0, SECTIONS - 1)
        width /= SECTIONS
        low_N1 = low_N1 + width * index_N1
        if remaining:
            above_NG = sums.log_ess_fraction((low_N1 + width * grid_G).clamp(max=p_max)) - log_target_N1
    left_N1, right_N1 = above_NG.gather(-1, index_N1), above_NG.gather(-1, index_N1 + 1)
    drop_N1 = left_N1 - right_N1
    inside_N1 = torch.where(drop_N1 > 0, left_N1 / drop_N1, 0.0).clamp(0, 1)
    return (low_N1 + width * inside_N1).clamp(p_min, p_max).squeeze(-1)


@lru_cache(maxsize=8)
def _unit_grid(device: torch.device) -> torch.Tensor:
    return torch.linspace(0, 1, SECTIONS + 1, dtype=torch.float64, device=device)
