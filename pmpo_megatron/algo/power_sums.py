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

Why it is cheap. A token is not raised to K powers. It is added to one of 33 cells of its band as 1, y, y^2, ..., with y its
distance from the cell's centre, and the cells' sums are turned into the bands' coefficients by Taylor's series, one small
matrix product for all tokens. |q*y| is at most 4/33, so that a dozen terms reach float64's precision, without cancellation.

Legend: N trajectories, T tokens on this rank, K coefficients, B bands, C cells of a band, J moments, G orders asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

LOG_RATIO_LIMIT = 20.0  # log-ratios are clamped to [-20, 20]: the range of float32 sums, a choice of ours
CELLS = 33  # of a band; odd, so that the middle one's centre is the band's
MOMENTS = 6  # columns in front of the bands: tokens, clipped, non-finite, sum x, sum x^2, tokens outside the middle band
TOKENS, CLIPPED, NON_FINITE, SUM, SUM_OF_SQUARES, OUTER = range(MOMENTS)
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
    while reach**count / math.factorial(count) > 1e-16:
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
        """Terms of Taylor's series of exp(q*y) over a cell, whose remainder is below 1e-16."""
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
    """From sums of y^j in the cells of a band to its Chebyshev coefficients: [J, C, K], and [C, K] for j = 0 in the middle.

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
    x_T: torch.Tensor,
    segment_T: torch.Tensor,
    num_trajectories: int,
    *,
    clipped_T: torch.Tensor,
    finite_T: torch.Tensor,
    interval: OrderInterval,
) -> torch.Tensor:
    """This rank's additive table of its tokens, float64 [1 + N, MOMENTS + B*K].

    Args:
        x_T: float64 [T], (clipped) log-ratios within +-LOG_RATIO_LIMIT; 0 where not finite.
        segment_T: int64 [T], 1 + the trajectory of each token; 0 for tokens that belong to none (row 0 is ignored).
        clipped_T, finite_T: bool [T], counted per trajectory.

    Memory beyond a few [T] vectors: the sums of one moment in the cells, N * 5.5 KiB for p in [0, 1].
    """
    rows, bands = num_trajectories + 1, interval.num_bands
    spacing = interval.band_width / CELLS
    cell_T = torch.round(x_T * (1 / spacing))
    y_T = torch.sub(x_T, cell_T, alpha=spacing)
    index_T = cell_T.long().add_(segment_T, alpha=bands * CELLS).add_(bands * CELLS // 2)
    flags = x_T.new_zeros(2, rows)
    flags[0].scatter_add_(0, segment_T, clipped_T.to(x_T.dtype))
    flags[1].scatter_add_(0, segment_T, (~finite_T).to(x_T.dtype))

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
    return torch.cat([_moments(flags, *weighted), coefficients.view(rows, -1)], dim=1)


def _moments(flags: torch.Tensor, count: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The columns in front of the bands [1 + N, MOMENTS]: with x = c + y, sum x = sum c + sum y, and so for x^2."""
    total, squares = count[:, 1] + first[:, 0], count[:, 2] + 2 * first[:, 1] + second[:, 0]
    return torch.stack([count[:, 0], *flags, total, squares, count[:, 3]], dim=1)


@dataclass(frozen=True)
class PowerSums:
    """A reduced table, read: per-trajectory counts and moments, and log-means of any order of the interval."""

    interval: OrderInterval
    moments: torch.Tensor  # [N, MOMENTS]
    bands: torch.Tensor  # [N, B, K]

    @staticmethod
    def read(table: torch.Tensor, interval: OrderInterval) -> PowerSums:
        """From the table of `tabulate`, summed over the ranks that share these trajectories."""
        shape = len(table) - 1, interval.num_bands, interval.num_nodes
        return PowerSums(interval, table[1:, :MOMENTS], table[1:, MOMENTS:].reshape(shape))

    @property
    def length_N(self) -> torch.Tensor:
        return self.moments[:, TOKENS]

    @property
    def clip_fraction_N(self) -> torch.Tensor:
        return self.moments[:, CLIPPED] / self.length_N.clamp(min=1)

    @property
    def non_finite_N(self) -> torch.Tensor:
        """How many of the tokens are not finite."""
        return self.moments[:, NON_FINITE]

    @property
    def mean_N(self) -> torch.Tensor:
        return self.moments[:, SUM] / self.length_N.clamp(min=1)

    @property
    def variance_N(self) -> torch.Tensor:
        return (self.moments[:, SUM_OF_SQUARES] / self.length_N.clamp(min=1) - self.mean_N**2).clamp(min=0)

    def log_mean(self, basis: torch.Tensor, lift: torch.Tensor) -> torch.Tensor:
        """L(q) = log( (1/T) * sum_t exp(q * x[t]) ), float64 [N, G]; 0 for a trajectory without tokens.

        Args:
            basis, lift: the interval's functions of the G orders, [N, G, ...], or [G, ...] for orders that all share.
        """
        total_NG = ((basis @ self.bands.transpose(1, 2)) * lift).sum(-1)  # sums of exp, but exp - 1 in the middle band
        length_N1, outside_N1 = self.length_N.unsqueeze(-1), self.moments[:, OUTER:]
        divisor_N1 = length_N1.clamp(min=1)
        excess_NG = (total_NG - outside_N1) / divisor_N1  # S/T - 1, exact where ratios are near 1
        mean_NG = (total_NG + (length_N1 - outside_N1)) / divisor_N1  # S/T, exact where it is tiny
        return torch.where(excess_NG < -0.5, mean_NG.clamp(min=1e-300).log(), torch.log1p(excess_NG.clamp(min=-0.9)))

    def at(self, p_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(L(p), log M_p, log n(p)), float64 [N]; log M_p is continuous through p = 0, where it is the mean log-ratio.

        Below |p| = 1e-6 the quotient L(p)/p would magnify rounding, and mean + p*variance/2 is exact to |p|^2.
        """
        q_N2 = torch.stack([p_N, 2 * p_N], dim=-1)
        log_mean_N, twice_N = self.log_mean(self.interval.basis(q_N2), self.interval.lift(q_N2)).unbind(-1)
        small = p_N.abs() < 1e-6
        quotient_N = log_mean_N / torch.where(small, 1.0, p_N)
        log_power_mean_N = torch.where(small, self.mean_N + p_N * self.variance_N / 2, quotient_N)
        return log_mean_N, log_power_mean_N, (2 * log_mean_N - twice_N).clamp(max=0.0)

    def log_ess_fraction(self, p_NG: torch.Tensor) -> torch.Tensor:
        """log n(p) = log( ESS(p)/T ) = 2 L(p) - L(2p), float64 [N, G], in (-log T, 0]."""
        q = torch.cat([p_NG, 2 * p_NG], dim=-1)
        return self._log_ess(self.interval.basis(q), self.interval.lift(q))

    def log_ess_on_grid(self, p_min: float, p_max: float, sections: int) -> torch.Tensor:
        """`log_ess_fraction` at the ends of equal sections of [p_min, p_max], the same for all: float64 [N, sections + 1]."""
        return self._log_ess(*_grid(self.interval, p_min, p_max, sections, self.bands.device))

    def _log_ess(self, basis: torch.Tensor, lift: torch.Tensor) -> torch.Tensor:
        once_NG, twice_NG = self.log_mean(basis, lift).chunk(2, dim=-1)
        return (2 * once_NG - twice_NG).clamp(max=0.0)


@lru_cache(maxsize=64)
def _grid(interval: OrderInterval, p_min: float, p_max: float, sections: int, device: torch.device):
    p_G = torch.linspace(p_min, p_max, sections + 1, dtype=torch.float64, device=device)
    q = torch.cat([p_G, 2 * p_G])
    return interval.basis(q), interval.lift(q)
