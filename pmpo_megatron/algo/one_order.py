"""The sums of powers of every trajectory's ratios at one order p that is known beforehand: what needs no table of all orders.

Legend: N trajectories, T tokens on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pmpo_megatron.algo.sums import SegmentSums, TrajectorySums

EXPM1_BELOW = 0.05  # |p| for which |p * x| <= 1, so that sums of exp - 1 tell more than sums of exp


def tabulate_order(
    x_T: torch.Tensor, flag_T: torch.Tensor, segment_T: torch.Tensor, num_trajectories: int, *, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's additive table of its tokens at one order, float64 [N, 4], and exp(p * x) [T].

    Arguments as those of `power_sums.tabulate`. The columns are tokens, flags, and the sums of exp(p*x) and exp(2p*x); of
    exp(..) - 1 where |p| < EXPM1_BELOW; of x and 2x where p = 0.
    """
    if p == 0:
        power_T, first_T = torch.ones_like(x_T), x_T
    elif abs(p) < EXPM1_BELOW:
        first_T = torch.expm1(p * x_T)
        power_T = first_T + 1
    else:
        power_T = first_T = x_T.exp() if p == 1 else (p * x_T).exp_()
    sums = SegmentSums(segment_T, num_trajectories + 1)
    first, second = sums.sum(first_T), sums.sum(first_T * power_T if first_T is power_T else first_T * (power_T + 1))
    count = sums.sum(flag_T.new_ones(()).expand_as(flag_T))
    return torch.stack([count, sums.sum(flag_T), first, second], dim=1)[1:], power_T


@dataclass(frozen=True)
class OneOrder(TrajectorySums):
    """The reduced table of `tabulate_order`, read: what `PowerSums` tells, at the one order p."""

    p: float
    first_N: torch.Tensor
    second_N: torch.Tensor

    @staticmethod
    def read(table: torch.Tensor, p: float) -> OneOrder:
        length_N, flagged_N, first_N, second_N = table.unbind(-1)
        return OneOrder(length_N, flagged_N, p, first_N, second_N)

    def at(self, p_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gives what `TrajectorySums.at` says; ``p_N`` is p everywhere."""
        divisor_N = self.length_N.clamp(min=1)
        first_N, second_N = self.first_N / divisor_N, self.second_N / divisor_N
        if self.p == 0:
            return torch.zeros_like(first_N), first_N, torch.zeros_like(first_N)
        if abs(self.p) < EXPM1_BELOW:
            log_mean_N, twice_N = first_N.log1p(), second_N.log1p()
        else:
            empty_N = self.length_N == 0
            log_mean_N, twice_N = first_N.masked_fill(empty_N, 1.0).log(), second_N.masked_fill(empty_N, 1.0).log()
        return log_mean_N, log_mean_N / self.p, (2 * log_mean_N - twice_N).clamp(max=0.0)
