"""The sums of powers of every trajectory's ratios at one order p that is known beforehand: what needs no table of all orders.

Legend: N trajectories, T tokens on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ORDER_COLUMNS = 5  # of `tabulate_order`: tokens, clipped, non-finite, and the sums of two powers
EXPM1_BELOW = 0.05  # |p| for which |p * x| <= 1, so that sums of exp - 1 tell more than sums of exp


def tabulate_order(
    x_T: torch.Tensor,
    segment_T: torch.Tensor,
    num_trajectories: int,
    *,
    clipped_T: torch.Tensor,
    finite_T: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's additive table of its tokens at one order, float64 [1 + N, ORDER_COLUMNS], and exp(p * x) [T].

    As `power_sums.tabulate`, for a p that is known beforehand. The last two columns are the sums of exp(p*x) and exp(2p*x); of
    exp(..) - 1 where |p| < EXPM1_BELOW; of x and 0 where p = 0.
    """
    if p == 0:
        power_T, first_T, second_T = torch.ones_like(x_T), x_T, None
    elif abs(p) < EXPM1_BELOW:
        first_T = torch.expm1(p * x_T)
        power_T, second_T = first_T + 1, first_T * (first_T + 2)
    else:
        power_T = first_T = x_T.exp() if p == 1 else torch.exp(p * x_T)
        second_T = power_T * power_T
    table = x_T.new_zeros(ORDER_COLUMNS, num_trajectories + 1)
    for row, column_T in zip(table, (torch.ones_like(x_T), clipped_T, ~finite_T, first_T, second_T), strict=True):
        if column_T is not None:
            row.scatter_add_(0, segment_T, column_T.to(x_T.dtype))
    return table.t().contiguous(), power_T


@dataclass(frozen=True)
class OneOrder:
    """The reduced table of `tabulate_order` without its row 0, read: what `PowerSums` tells, at the one order p."""

    p: float
    table: torch.Tensor  # [N, ORDER_COLUMNS]

    @property
    def length_N(self) -> torch.Tensor:
        return self.table[:, 0]

    @property
    def clip_fraction_N(self) -> torch.Tensor:
        return self.table[:, 1] / self.length_N.clamp(min=1)

    @property
    def non_finite_N(self) -> torch.Tensor:
        return self.table[:, 2]

    def at(self, p_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(L(p), log M_p, log n(p)), float64 [N], as `PowerSums.at`; ``p_N`` is p everywhere."""
        first_N, second_N = (self.table[:, 3:] / self.length_N.clamp(min=1).unsqueeze(-1)).unbind(-1)
        if self.p == 0:
            return torch.zeros_like(first_N), first_N, torch.zeros_like(first_N)
        if abs(self.p) < EXPM1_BELOW:
            log_mean_N, twice_N = first_N.log1p(), second_N.log1p()
        else:
            empty_N = self.length_N == 0
            log_mean_N, twice_N = first_N.masked_fill(empty_N, 1.0).log(), second_N.masked_fill(empty_N, 1.0).log()
        return log_mean_N, log_mean_N / self.p, (2 * log_mean_N - twice_N).clamp(max=0.0)
