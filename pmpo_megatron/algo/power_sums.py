"""The sums of powers of every trajectory's ratios, for all orders of an interval at once, from one table.

Everything PMPO needs to know of a trajectory is S(q) = sum_t exp(q * x[t]) for x[t] its clipped log-ratios and q in some
interval: log M_p = log(S(p)/T)/p, ESS(p) = S(p)^2 / S(2p). Tokens of a trajectory may lie on several ranks, so the table
below is additive: built from any subset of tokens, summed over ranks, and then good for every q without further
communication.

Why it is exact. S is a sum of exponentials, and exp(q*x) is an entire function of q whose Chebyshev interpolation on an
interval of half-width Q converges like (Q*|x|/2)^n / n!. Log-ratios reach +-20, where that is slow; so tokens are sorted
into bands of half-width 1 around centres c_j = 2j, and what is interpolated is exp(q*(x - c_j)), after which the factor
exp(q*c_j) is put back exactly. All terms are positive, so the relative error of each band is that of S: below 1e-14 with
`nodes_for`'s number of nodes, however heavy the tail. Interpolating log S itself, as one might first try, fails there:
log S has complex singularities at distance pi/|x| from the real axis. The band around 0 holds expm1(q*x) instead, so that
S(q)/T - 1 keeps its relative accuracy when all ratios are near 1.

Legend: N trajectories, T tokens on this rank, K nodes, B bands, G orders asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LOG_RATIO_LIMIT = 20.0  # log-ratios are clamped to [-20, 20]: the range of float32 sums (objective.md, our choice)
BAND_WIDTH = 2.0
BANDS = 2 * round(LOG_RATIO_LIMIT / BAND_WIDTH) + 1
MIDDLE = BANDS // 2
MOMENTS = 5  # columns in front of the bands: tokens, clipped tokens, non-finite tokens, sum x, sum x^2
TOKENS, CLIPPED, NON_FINITE, SUM, SUM_OF_SQUARES = range(MOMENTS)
CHUNK = 16384  # tokens whose [CHUNK, K] table of powers exists at one time


def nodes_for(half_width: float) -> int:
    """Nodes with which exp(q*x), |x| <= 1, is interpolated to 1e-16 of its smallest value for q in +-``half_width``."""
    count = 8
    while 2 * math.exp(2 * half_width) * (half_width / 2) ** count / math.factorial(count) > 1e-16:
        count += 1
    return count


@dataclass(frozen=True)
class OrderInterval:
    """Orders q in [low, high] for which sums are wanted, with the Chebyshev nodes that represent them."""

    low: float
    high: float

    @staticmethod
    def covering(p_min: float, p_max: float) -> OrderInterval:
        """The orders that a solve for p in [p_min, p_max] needs: p and 2p, and 0 and 1 for reference points."""
        return OrderInterval(2 * min(0.0, p_min), 2 * max(1.0, p_max))

    @property
    def num_nodes(self) -> int:
        return nodes_for((self.high - self.low) / 2)

    def nodes(self, device: torch.device) -> torch.Tensor:
        """Chebyshev nodes of the first kind, float64 [K]."""
        k = torch.arange(self.num_nodes, dtype=torch.float64, device=device)
        unit = torch.cos((2 * k + 1) * math.pi / (2 * self.num_nodes))
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * unit

    def barycentric(self, q: torch.Tensor) -> torch.Tensor:
        """Weights [..., K] with which values at the nodes are combined to the value at ``q`` (Berrut and Trefethen 2004)."""
        nodes = self.nodes(q.device)
        k = torch.arange(self.num_nodes, dtype=torch.float64, device=q.device)
        node_weights = (-1.0) ** k * torch.sin((2 * k + 1) * math.pi / (2 * self.num_nodes))
        distance = q.unsqueeze(-1) - nodes
        hit = distance == 0
        quotient = torch.where(hit, 1.0, node_weights / torch.where(hit, 1.0, distance))
        quotient = torch.where(hit.any(-1, keepdim=True), hit.to(torch.float64), quotient)
        return quotient / quotient.sum(-1, keepdim=True)


def tabulate(
    x_T: torch.Tensor,
    segment_T: torch.Tensor,
    num_trajectories: int,
    *,
    clipped_T: torch.Tensor,
    finite_T: torch.Tensor,
    interval: OrderInterval,
) -> torch.Tensor:
    """This rank's additive table of its tokens, float64 [N + 1, MOMENTS + B*K].

    Args:
        x_T: float64 [T], (clipped) log-ratios within +-LOG_RATIO_LIMIT; 0 where not finite.
        segment_T: int64 [T], trajectory of each token; N for tokens that belong to none (their row is ignored).
        clipped_T, finite_T: bool [T], counted per trajectory.

    Memory beyond a few [T] vectors: one [CHUNK, K] table.
    """
    rows = num_trajectories + 1
    moments = x_T.new_zeros(rows, MOMENTS)
    columns = (torch.ones_like(x_T), clipped_T.to(x_T.dtype), (~finite_T).to(x_T.dtype), x_T, x_T * x_T)
    for column, values in enumerate(columns):
        moments[:, column].index_add_(0, segment_T, values)
    nodes = interval.nodes(x_T.device)
    powers = x_T.new_zeros(rows * BANDS, nodes.numel())
    for start in range(0, x_T.numel(), CHUNK):
        x = x_T[start : start + CHUNK]
        band = torch.round(x / BAND_WIDTH)
        exponent = torch.outer(x - BAND_WIDTH * band, nodes)
        term = torch.where((band == 0).unsqueeze(-1), torch.expm1(exponent), torch.exp(exponent))
        powers.index_add_(0, segment_T[start : start + CHUNK] * BANDS + band.long() + MIDDLE, term)
    return torch.cat([moments, powers.view(rows, -1)], dim=1)


@dataclass(frozen=True)
class PowerSums:
    """A reduced table, read: per-trajectory counts and moments, and log-means of any order of the interval."""

    interval: OrderInterval
    moments: torch.Tensor  # [N, MOMENTS]
    bands: torch.Tensor  # [N, B, K]

    @staticmethod
    def read(table: torch.Tensor, interval: OrderInterval) -> PowerSums:
        """From the table of `tabulate`, summed over the ranks that share these trajectories."""
        table = table[:-1]
        return PowerSums(interval, table[:, :MOMENTS], table[:, MOMENTS:].reshape(len(table), BANDS, interval.num_nodes))

    @property
    def length_N(self) -> torch.Tensor:
        return self.moments[:, TOKENS]

    @property
    def mean_N(self) -> torch.Tensor:
        return self.moments[:, SUM] / self.length_N.clamp(min=1)

    @property
    def variance_N(self) -> torch.Tensor:
        return (self.moments[:, SUM_OF_SQUARES] / self.length_N.clamp(min=1) - self.mean_N**2).clamp(min=0)

    def log_mean(self, q_NG: torch.Tensor) -> torch.Tensor:
        """L(q) = log( (1/T) * sum_t exp(q * x[t]) ), float64 [N, G]; 0 for a trajectory without tokens."""
        inner_NGB = torch.einsum("ngk,nbk->ngb", self.interval.barycentric(q_NG), self.bands)
        centre_B = BAND_WIDTH * (torch.arange(BANDS, dtype=torch.float64, device=q_NG.device) - MIDDLE)
        middle_NG = inner_NGB[..., MIDDLE]  # sum of exp - 1 over the middle band's tokens; the other bands sum exp
        outer_NG = (inner_NGB * torch.exp(q_NG.unsqueeze(-1) * centre_B)).sum(-1) - middle_NG
        length_N1, outer_count_N1 = self.length_N.clamp(min=1).unsqueeze(-1), self._outer_count_N.unsqueeze(-1)
        excess_NG = (middle_NG + outer_NG - outer_count_N1) / length_N1  # S/T - 1, exact where ratios are near 1
        mean_NG = (middle_NG + outer_NG + (self.length_N.unsqueeze(-1) - outer_count_N1)) / length_N1  # S/T, exact where tiny
        tiny_NG = (excess_NG < -0.5) & (mean_NG > 0)
        return torch.where(tiny_NG, torch.log(torch.where(tiny_NG, mean_NG, 1.0)), torch.log1p(excess_NG.clamp(min=-0.9)))

    @property
    def _outer_count_N(self) -> torch.Tensor:
        """Tokens outside the middle band: S(0) of the outer bands, rounded to the integer that it is."""
        zero = torch.zeros(1, dtype=torch.float64, device=self.bands.device)
        at_zero_B = self.bands @ self.interval.barycentric(zero)[0]
        return (at_zero_B.sum(-1) - at_zero_B[:, MIDDLE]).round()

    def log_power_mean(self, p_N: torch.Tensor) -> torch.Tensor:
        """log M_p, float64 [N]; continuous through p = 0, where it is the mean log-ratio.

        Below |p| = 1e-6 the quotient L(p)/p would magnify rounding, and mean + p*variance/2 is exact to |p|^2.
        """
        small = p_N.abs() < 1e-6
        safe = torch.where(small, 1.0, p_N)
        quotient = self.log_mean(safe.unsqueeze(-1)).squeeze(-1) / safe
        return torch.where(small, self.mean_N + p_N * self.variance_N / 2, quotient)

    def log_ess_fraction(self, p_NG: torch.Tensor) -> torch.Tensor:
        """log n(p) = log( ESS(p)/T ) = 2 L(p) - L(2p), float64 [N, G], in (-log T, 0]."""
        both = self.log_mean(torch.cat([p_NG, 2 * p_NG], dim=-1))
        size = p_NG.shape[-1]
        return (2 * both[:, :size] - both[:, size:]).clamp(max=0.0)
