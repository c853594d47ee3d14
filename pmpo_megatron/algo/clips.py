"""The clips of single tokens: one class each. A clip of your own is such a class in a file of yours: docs/adding_a_rule.md.

A clip says what of a token goes into the power mean, which tokens it holds back (the clip fraction, by which rules choose p),
and whether those still pass a gradient.

Legend: N trajectories, T tokens on this rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from pmpo_megatron.algo.sums import LOG_RATIO_LIMIT
from pmpo_megatron.config import Section, setting


@dataclass(frozen=True)
class Tokens:
    """What a clip sees of this rank's tokens, all without gradient.

    Attributes:
        log_ratio_T: float64, new - old, within +-LOG_RATIO_LIMIT, 0 where not finite.
        log_probs_T, old_log_probs_T: as they were given; also NaN or inf.
        advantage_N: float64, of each trajectory.
        segment_T: 1 + the trajectory of each token; 0 for a token of none.
    """

    log_ratio_T: torch.Tensor
    log_probs_T: torch.Tensor
    old_log_probs_T: torch.Tensor
    advantage_N: torch.Tensor
    segment_T: torch.Tensor

    def of_trajectory(self, values_N: torch.Tensor) -> torch.Tensor:
        """Each token's trajectory's value, [T]; 0 for tokens of none."""
        return torch.cat([values_N.new_zeros(1), values_N]).index_select(0, self.segment_T)

    def changed(self, x_T: torch.Tensor) -> torch.Tensor:
        """1 where ``x_T`` is not the log-ratio, else 0, of the log-probs' type; a comparison, converted, takes longer."""
        return (x_T - self.log_ratio_T).sign_().to(self.log_probs_T.dtype).square_()


@dataclass(frozen=True, kw_only=True)
class Clip(Section):
    """How single tokens are clipped. A subclass is a frozen dataclass whose fields, made by `setting`, are its parameters."""

    clipped_pass_gradient: ClassVar[bool] = False

    def clip(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_T, the log-ratios that are averaged; 1 where a token is clipped, else 0, of the log-probs' type).

        x_T is float64, finite and within +-LOG_RATIO_LIMIT. All tokens at once: no loop, and no branch on a tensor's value,
        which would wait for a GPU.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Unclipped(Clip):
    """No token is clipped: clip level sequence."""

    def clip(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens.log_ratio_T, torch.zeros_like(tokens.log_probs_T)


@dataclass(frozen=True, kw_only=True)
class Bounded(Clip):
    """A clip with bounds in log space, which are the objective's eps_* in either unit."""

    low: float = setting(help="lower bound", unit="log-ratio", minimum=-LOG_RATIO_LIMIT)
    high: float = setting(help="upper bound", unit="log-ratio", maximum=LOG_RATIO_LIMIT)


@dataclass(frozen=True, kw_only=True)
class OneSided(Bounded):
    """PPO's clip, in log space: min(log_ratio, high) where A > 0, max(log_ratio, low) where A < 0 (docs/objective.md)."""

    def clip(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        upper_N = torch.full_like(tokens.advantage_N, self.high).masked_fill_(tokens.advantage_N <= 0, math.inf)
        lower_N = torch.full_like(tokens.advantage_N, self.low).masked_fill_(tokens.advantage_N >= 0, -math.inf)
        x_T = tokens.log_ratio_T.clamp(tokens.of_trajectory(lower_N), tokens.of_trajectory(upper_N))
        return x_T, tokens.changed(x_T)


@dataclass(frozen=True, kw_only=True)
class Weight(Bounded):
    """CISPO (2506.13585): the ratio is a coefficient, clipped whatever the sign of A; every token passes its gradient."""

    clipped_pass_gradient: ClassVar[bool] = True

    def clip(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        x_T = tokens.log_ratio_T.clamp(self.low, self.high)
        return x_T, tokens.changed(x_T)


@dataclass(frozen=True, kw_only=True)
class Divergence(Clip):
    """DPPO's mask by total variation of the sampled token against all others (2602.04879).

    A token passes no gradient where its probability, not its ratio, left the trust region in the direction that A rewards:
    new - old > high and A > 0, or old - new > low and A < 0. Its ratio stays in the mean as it is.
    """

    low: float = setting(0.2, "largest fall of a token's probability", above=0.0, maximum=1.0)
    high: float = setting(0.2, "largest rise of a token's probability", above=0.0, maximum=1.0)

    def clip(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        rise_T = (tokens.log_probs_T.double().exp() - tokens.old_log_probs_T.double().exp()).nan_to_num(0.0, 0.0, 0.0)
        sign_T = tokens.of_trajectory(tokens.advantage_N.sign())
        masked_T = ((sign_T > 0) & (rise_T > self.high)) | ((sign_T < 0) & (rise_T < -self.low))
        return tokens.log_ratio_T, masked_T.to(tokens.log_probs_T.dtype)


CLIPS: dict[str, type[Clip]] = {"one_sided": OneSided, "weight": Weight, "divergence": Divergence}
