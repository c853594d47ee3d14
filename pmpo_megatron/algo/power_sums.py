"""The sums of powers of every trajectory's ratios, for all orders of an interval at once, from one table.

Everything PMPO needs to know of a trajectory is S(q) = sum_t exp(q * x[t]) for x[t] its clipped log-ratios and q in some
interval: log M_p = log(S(p)/T)/p, ESS(p) = S(p)^2 / S(2p). Tokens of a trajectory may lie on several ranks, so the table
below is additive: built from any subset of tokens, summed over ranks, and then good for every q without further
communication.

Why it is exact. S is a sum of exponentials, and exp(q*x) is an entire function of q whose Chebyshev interpolation on an
interval of half-width Q converges like (Q*|x|/2)^n / n!. Log-ratios reach +-20, where that is slow; so tokens are sorted
into bands around centres c_j, of half-width at most 1, and what is interpolated is exp(q*(x - c_j)), after which the factor
exp(q*c_j) is put back exactly. All terms are positive, so the relative error of each band is that of S: below 1e-13 with
`nodes_for`'s number of nodes, however heavy the tail. Interpolating log S itself, as one might first try, fails there:
log S has complex singularities at distance pi/|x| from the real axis. The band around 0 holds expm1(q*x) instead, so that
S(q)/T - 1 keeps its relative accuracy when all ratios are near 1.

Why it is cheap. A token is not raised to K powers. It is added to one of 65 cells of its band as 1, y, y^2, ..., with y its
distance from the cell's centre, and the cells' sums are turned into the bands' coefficients by Taylor's series, one small
matrix product for all tokens. |q*y| is at most 4/65, so that a few terms leave less than 1e-14, without cancellation.

Legend: N trajectories, T tokens on this rank, K coefficients, B bands, C cells of a band, J moments, G orders asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from pmpo_megatron.algo.sums import LOG_RATIO_LIMIT, SegmentSums, TrajectorySums

CELLS = 65  # of a band; odd, so that the middle one's centre is the band's
MOMENTS = 5  # columns in front of the bands: tokens, flags, sum x, sum x^2, tokens outside the middle band
REACH = 2.0  # largest (half-width of the orders) * (half-width of a band): rounding is magnified by exp(2 * REACH)


@lru_cache(maxsize=64)
def nodes_for(half_width: float) -> int:
    """Nodes with which exp(q*x), |x| <= 1, is interpolated to 1e-16 of its smallest value for q in +-``half_width``."""
    count = 8
    while 2 * math.exp(2 * half_width) * (half_width / 2) ** count / math.factorial(count) > 1e-16:
        count += 1
    return count


@lru_cache(maxsize=64)
def _terms_for(reach: float) -> int:
    count = 3
    while reach**count / math.factorial(count) > 1e-14:
        count += 1
    return count


@lru_cache(maxsize=64)
def _degrees(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class OrderInterval:
    """Orders q in [low, high] for which sums are wanted, and the bands, cells and coefficients that represent them."""

    low: float
    high: float

    @staticmethod
    def covering(p_min: float, p_max: float) -> OrderInterval:
        """The orders that a solve for p in [p_min, p_max] needs: p and 2p, and 0 and 1 for reference points."""
        return OrderInterval(2 * min(0.0, p_min), 2 * max(1.0, p_max))

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def band_width(self) -> float:
        return 2 * min(1.0, REACH / self.half_width)

    @property
    def num_bands(self) -> int:
        return 2 * math.ceil(LOG_RATIO_LIMIT / self.band_width) + 1

    @property
    def num_nodes(self) -> int:
        return nodes_for(self.half_width * self.band_width / 2)

    @property
    def num_moments(self) -> int:
        """Terms of Taylor's series of exp(q*y) over a cell, whose remainder is below 1e-14."""
        return _terms_for(max(-self.low, self.high) * self.band_width / (2 * CELLS))

    def basis(self, q: torch.Tensor) -> torch.Tensor:
        """Chebyshev polynomials [..., K] at ``q``: coefficients times these, summed, are the value at ``q``."""
        unit = ((q - (self.low + self.high) / 2) / self.half_width).clamp(-1, 1)
        return torch.cos(torch.acos(unit).unsqueeze(-1) * _degrees(self.num_nodes, q.device))

    def lift(self, q: torch.Tensor) -> torch.Tensor:
        """exp(q * c) for the centres c of the bands, [..., B]."""
        return torch.exp(q.unsqueeze(-1) * band_centres(self, q.device))


@lru_cache(maxsize=64)
def band_centres(interval: OrderInterval, device: torch.device) -> torch.Tensor:
    """float64 [B]; the middle one is 0."""
    index = torch.arange(interval.num_bands, dtype=torch.float64, device=device)
    return interval.band_width * (index - interval.num_bands // 2)


@lru_cache(maxsize=64)
def _cell_centres(interval: OrderInterval, device: torch.device) -> torch.Tensor:
    """float64 [C], from the centre of their band."""
    return interval.band_width / CELLS * (torch.arange(CELLS, dtype=torch.float64, device=device) - CELLS // 2)


@lru_cache(maxsize=64)
def _conversion(interval: OrderInterval, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What takes sums of y^j in a band's cells to Chebyshev coefficients: [J, C, K], and [C, K] for j = 0 in the middle.

    exp(q*(c+y)) = exp(q*c) * sum_j q^j/j! * y^j at the nodes q, then the cosine transform from nodes to coefficients. The
    middle band lacks the 1 of exp - 1, exactly: it has expm1(q*c) for j = 0.
    """
    count = interval.num_nodes
    angle = (2 * torch.arange(count, dtype=torch.float64, device=device) + 1) * math.pi / (2 * count)
    node_K = (interval.low + interval.high) / 2 + interval.half_width * torch.cos(angle)
    transform_KK = 2 / count * torch.cos(torch.outer(angle, torch.arange(count, dtype=torch.float64, device=device)))
    transform_KK[:, 0] /= 2
    exponent_CK = torch.outer(_cell_centres(interval, device), node_K)
    outer_JCK = torch.stack([torch.exp(exponent_CK) * node_K**j / math.factorial(j) for j in range(interval.num_moments)])
    return outer_JCK @ transform_KK, torch.expm1(exponent_CK) @ transform_KK


@lru_cache(maxsize=64)
def _cell_weights(interval: OrderInterval, device: torch.device) -> torch.Tensor:
    """Columns 1, c, c^2 with c the cells' centres, and 1 outside the middle band: float64 [B*C, 4]."""
    centre_BC = band_centres(interval, device).unsqueeze(-1) + _cell_centres(interval, device)
    outside_BC = (band_centres(interval, device) != 0).double().unsqueeze(-1).expand_as(centre_BC)
    return torch.stack([torch.ones_like(centre_BC), centre_BC, centre_BC**2, outside_BC], dim=-1).flatten(0, 1)


def tabulate(
    x_T: torch.Tensor, flag_T: torch.Tensor, segment_T: torch.Tensor, num_trajectories: int, *, interval: OrderInterval
) -> torch.Tensor:
    """This rank's additive table of its tokens, float64 [N, MOMENTS + B*K].

    Args:
        x_T: float64 [T], (clipped) log-ratios within +-LOG_RATIO_LIMIT; 0 where not finite.
        flag_T: [T], 1 where a token is clipped, NaN where it is not finite, else 0.
        segment_T: int64 [T], 1 + the trajectory of each token; 0 for tokens that belong to none.

    Memory beyond a few [T] vectors: the sums of one moment in the cells, N * 11 KiB for p in [0, 1].
    """
    rows, bands = num_trajectories + 1, interval.num_bands
    spacing = interval.band_width / CELLS
    cell_T = (x_T * (1 / spacing)).round_()
    index_T = cell_T.long().add_(segment_T, alpha=bands * CELLS).add_(bands * CELLS // 2)
    y_T = cell_T.mul_(-spacing).add_(x_T)

    outer_JCK, middle_CK = _conversion(interval, x_T.device)
    middle, weighted = slice(bands // 2, None, bands), []
    cells = x_T.new_zeros(rows * bands, CELLS)  # of one moment after the other, so that it stays in the cache
    power_T = torch.ones_like(x_T)
    for j in range(interval.num_moments):
        if j > 0:
            cells.zero_()
            power_T.mul_(y_T)
        cells.view(-1).scatter_add_(0, index_T, power_T)
        if j == 0:
            coefficients = cells @ outer_JCK[0]
            coefficients[middle] = cells[middle] @ middle_CK
        else:
            coefficients.addmm_(cells, outer_JCK[j])
        if j < 3:
            weighted.append(cells.view(rows, -1) @ _cell_weights(interval, x_T.device))
    count, first, second = weighted  # with x = c + y, sum x = sum c + sum y, and so for x^2
    total, squares = count[:, 1] + first[:, 0], count[:, 2] + 2 * first[:, 1] + second[:, 0]
    flagged = SegmentSums(segment_T, rows).sum(flag_T)
    moments = torch.stack([count[:, 0], flagged, total, squares, count[:, 3]], dim=1)
    return torch.cat([moments, coefficients.view(rows, -1)], dim=1)[1:]


@dataclass(frozen=True)
class PowerSums(TrajectorySums):
    """A reduced table, read: per-trajectory counts and moments, and log-means of any order of the interval.

    Attributes:
        mean_N, variance_N: of the clipped log-ratios.
        statistics: of the group that each trajectory belongs to, float64 [N] by name; see `objective.evaluate_objective`.
    """

    mean_N: torch.Tensor
    variance_N: torch.Tensor
    outside_N: torch.Tensor  # tokens outside the middle band
    bands: torch.Tensor  # [N, B, K]
    interval: OrderInterval
    statistics: Mapping[str, torch.Tensor]

    @staticmethod
    def read(table: torch.Tensor, interval: OrderInterval, statistics: Mapping[str, torch.Tensor]) -> PowerSums:
        """Reads the table of `tabulate`, summed over the ranks that share these trajectories."""
        length_N, flagged_N, sum_N, squares_N, outside_N = table[:, :MOMENTS].unbind(-1)
        divisor_N = length_N.clamp(min=1)
        mean_N = sum_N / divisor_N
        variance_N = (squares_N / divisor_N - mean_N**2).clamp(min=0)
        bands = table[:, MOMENTS:].reshape(len(table), interval.num_bands, interval.num_nodes)
        return PowerSums(length_N, flagged_N, mean_N, variance_N, outside_N, bands, interval, statistics)

    def log_mean(self, q_NG: torch.Tensor) -> torch.Tensor:
        """L(q) = log( (1/T) * sum_t exp(q * x[t]) ), float64 [N, G]; 0 for a trajectory without tokens.

        Args:
            q_NG: orders within the interval, [N, G], or [1, G] for orders that all share.
        """
        total_NG, divisor_N1 = self._totals(q_NG), self.length_N.clamp(min=1).unsqueeze(-1)
        outside_N1 = self.outside_N.unsqueeze(-1)
        excess_NG = (total_NG - outside_N1) / divisor_N1  # S/T - 1, exact where ratios are near 1
        mean_NG = (total_NG + (divisor_N1 - outside_N1)) / divisor_N1  # S/T, exact where it is tiny
        return torch.where(excess_NG < -0.5, mean_NG.clamp(min=1e-300).log(), torch.log1p(excess_NG.clamp(min=-0.9)))

    def _totals(self, q_NG: torch.Tensor) -> torch.Tensor:
        """Sums of exp(q * x) over each trajectory's tokens, but of exp - 1 for those in the middle band."""
        values = self.interval.basis(q_NG) @ self.bands.transpose(1, 2)
        return values.mul_(self.interval.lift(q_NG)).sum(-1)

    def at(self, p_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gives what `TrajectorySums.at` says; log M_p is continuous through p = 0, where it is the mean log-ratio.

        Below |p| = 1e-6 the quotient L(p)/p would magnify rounding, and mean + p*variance/2 is exact to |p|^2.
        """
        log_mean_N, twice_N = self.log_mean(torch.stack([p_N, 2 * p_N], dim=-1)).unbind(-1)
        small = p_N.abs() < 1e-6
        quotient_N = log_mean_N / torch.where(small, 1.0, p_N)
        log_power_mean_N = torch.where(small, self.mean_N + p_N * self.variance_N / 2, quotient_N)
        return log_mean_N, log_power_mean_N, (2 * log_mean_N - twice_N).clamp(max=0.0)

    def ess_fraction(self, p_NG: torch.Tensor) -> torch.Tensor:
        """n(p) = ESS(p)/T = S(p)^2 / (T S(2p)), float64 [N, G], in (0, 1]; orders as in `log_mean`."""
        length_N1 = self.length_N.clamp(min=1).unsqueeze(-1)
        sums = self._totals(torch.cat([p_NG, 2 * p_NG], dim=-1)).add_(length_N1 - self.outside_N.unsqueeze(-1))
        once_NG, twice_NG = sums.chunk(2, dim=-1)
        return once_NG.square().div_(twice_NG.mul_(length_N1)).clamp_(max=1.0)
