"""The PMPO objective: clip, choose p, aggregate by the power mean, and give a gradient that is right on any sharding.

Source: arXiv 2601.22521. The mathematics is in docs/objective.md, "The formulas". One call makes one collective: each rank
tabulates its own tokens (`power_sums.tabulate`), the table is summed over the ranks that share the trajectories, and
everything after that - p, ESS, M_p, the loss - is the same arithmetic on every rank.

Legend: N trajectories, T tokens on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pmpo_megatron.algo.objective_config import PRESETS, ObjectiveConfig
from pmpo_megatron.algo.one_order import OneOrder, tabulate_order
from pmpo_megatron.algo.power_sums import LOG_RATIO_LIMIT, PowerSums, tabulate
from pmpo_megatron.errors import ConfigError, NonFiniteError

__all__ = ["PRESETS", "ObjectiveConfig", "ObjectiveOutput", "evaluate_objective"]


@dataclass(frozen=True)
class ObjectiveOutput:
    """What `evaluate_objective` found. All but ``surrogate`` is detached and equal on all shards; [N] are float64.

    Attributes:
        loss: 0-d, -sum_i c_i A_i M_i over the N trajectories (count it once when shards are reduced).
        surrogate: 0-d; its gradient with respect to ``log_probs_T`` is the loss's, for this rank's tokens.
        p_N: the order of each trajectory.
        ess_N, target_ess_N: achieved and wanted effective sample size in tokens, in [1, T_i]; where the rule has no
            target, the achieved one.
        clip_fraction_N: clipped tokens over T_i; at clip level sequence 1 where the bound on M_p binds.
        length_N: T_i over all shards.
        power_mean_N: M_p before any sequence-level clip; 1 for a trajectory without tokens.
        non_finite_N: bool, NaN or inf came in: the trajectory contributes nothing here; see `raise_if_non_finite`.
    """

    loss: torch.Tensor
    surrogate: torch.Tensor
    p_N: torch.Tensor
    ess_N: torch.Tensor
    target_ess_N: torch.Tensor
    clip_fraction_N: torch.Tensor
    length_N: torch.Tensor
    power_mean_N: torch.Tensor
    non_finite_N: torch.Tensor

    def raise_if_non_finite(self, names: list[Any] | None = None) -> None:
        """Raises `NonFiniteError` that names the trajectories with NaN or inf. Synchronises: call it once per step."""
        found = self.non_finite_N.nonzero().flatten().tolist()
        if found:
            which = [names[i] if names else i for i in found[:8]]
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            raise NonFiniteError(f"NaN or inf in the log-probs, advantage or weight of trajectory {which}{more}")


def evaluate_objective(
    log_probs_T: torch.Tensor,
    old_log_probs_T: torch.Tensor,
    trajectory_T: torch.Tensor,
    advantages_N: torch.Tensor,
    weights_N: torch.Tensor,
    config: ObjectiveConfig,
    token_weights_T: torch.Tensor | None = None,
    progress: float = 0.0,
    sum_over_shards: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> ObjectiveOutput:
    """The loss of N trajectories, and a surrogate with its exact gradient for the tokens on this rank.

    Args:
        log_probs_T: float32 or float64 [T], requires grad.
        old_log_probs_T: [T], from the same code path at the start of the round.
        trajectory_T: int64 [T] in [0, N); -1 where a token is not a response token. In any order.
        advantages_N: [N].
        weights_N: [N], c_i of the whole optimizer step (docs/objective.md, "Settings"): the only denominator.
        config: the objective; see `PRESETS`.
        token_weights_T: [T], detached importance correction of each token's gradient (not of the reported loss).
        progress: share of training done, in [0, 1], for scheduled p.
        sum_over_shards: all-reduce(SUM) over the ranks that share these trajectories' tokens. It is called exactly
            once, on every rank, also where T or N is 0.

    Raises:
        ConfigError: shapes that do not belong together, log-probs of less than float32's precision, or a progress beyond
            [0, 1]. Nothing of a tensor's content is looked at, which would synchronise.
    """
    tokens = dict(log_probs_T=log_probs_T, old_log_probs_T=old_log_probs_T, trajectory_T=trajectory_T)
    _check_arguments(tokens | {"token_weights_T": token_weights_T}, advantages_N, weights_N, progress)
    advantage_N, weight_N = advantages_N.detach().double(), weights_N.detach().double()
    usable_N = advantage_N.isfinite() & weight_N.isfinite()
    advantage_N, weight_N = torch.where(usable_N, advantage_N, 0.0), torch.where(usable_N, weight_N, 0.0)
    segment_T = trajectory_T.clamp(min=-1) + 1

    clipped = _clip(log_probs_T.detach(), old_log_probs_T.detach(), token_weights_T, advantage_N, segment_T, config)
    chosen = _choose_order(clipped, segment_T, len(advantage_N), config, progress, sum_over_shards)
    mean = _aggregate(chosen, advantage_N, weight_N, usable_N, config)
    coefficient_T = _differentiate(clipped, segment_T, chosen, mean, token_weights_T)

    sums, ess_fraction_N = chosen.sums, torch.exp(chosen.log_ess_fraction_N)
    return ObjectiveOutput(
        loss=mean.loss,
        surrogate=_Surrogate.apply(log_probs_T, coefficient_T, clipped.log_ratio_T),
        p_N=chosen.p_N,
        ess_N=ess_fraction_N * sums.length_N,
        target_ess_N=(ess_fraction_N if chosen.target_N is None else chosen.target_N) * sums.length_N,
        clip_fraction_N=mean.clip_fraction_N,
        length_N=sums.length_N,
        power_mean_N=mean.power_mean_N,
        non_finite_N=(sums.non_finite_N > 0) | ~usable_N,
    )


@dataclass(frozen=True)
class _Clipped:
    """This rank's tokens [T]: float64 log-ratios before and after the clip, where it binds, and what is usable."""

    log_ratio_T: torch.Tensor
    x_T: torch.Tensor
    binds_T: torch.Tensor
    finite_T: torch.Tensor
    within_T: torch.Tensor


@dataclass(frozen=True)
class _Chosen:
    """p of each trajectory, its target if it has one, and what the sums are at p; `power_T` is exp(p * x) if known."""

    sums: PowerSums | OneOrder
    p_N: torch.Tensor
    target_N: torch.Tensor | None
    log_mean_N: torch.Tensor
    log_power_mean_N: torch.Tensor
    log_ess_fraction_N: torch.Tensor
    power_T: torch.Tensor | None


@dataclass(frozen=True)
class _Mean:
    """M_p, its part in the loss, and what a token's gradient is multiplied with besides its exp(p * x)."""

    loss: torch.Tensor
    power_mean_N: torch.Tensor
    clip_fraction_N: torch.Tensor
    share_N: torch.Tensor


def _clip(log_probs_T, old_log_probs_T, token_weights_T, advantage_N, segment_T, config: ObjectiveConfig) -> _Clipped:
    """Log-ratios, and their token-level clip, one-sided by the advantage's sign (docs/objective.md, "The formulas")."""
    log_ratio_T, finite_T, within_T = _log_ratios(log_probs_T, old_log_probs_T, token_weights_T)
    if config.clip_level == "sequence":
        return _Clipped(log_ratio_T, log_ratio_T, torch.zeros_like(finite_T), finite_T, within_T)
    low, high = config.log_bounds  # float64, as full_like makes them; torch.where of two numbers would be float32
    upper_N = torch.full_like(advantage_N, high).masked_fill(advantage_N <= 0, math.inf)
    lower_N = torch.full_like(advantage_N, low).masked_fill(advantage_N >= 0, -math.inf)
    x_T = torch.minimum(log_ratio_T, _of_token(upper_N, segment_T)).maximum(_of_token(lower_N, segment_T))
    return _Clipped(log_ratio_T, x_T, x_T != log_ratio_T, finite_T, within_T)


def _choose_order(
    clipped: _Clipped,
    segment_T: torch.Tensor,
    num_trajectories: int,
    config: ObjectiveConfig,
    progress: float,
    sum_over_shards: Callable[[torch.Tensor], torch.Tensor],
) -> _Chosen:
    """p by the rule, from the one collective: of sums at a p that is known beforehand, else of sums for all orders."""
    rule, power_T, target_N = config.exponent_rule, None, None
    counted = dict(clipped_T=clipped.binds_T, finite_T=clipped.finite_T)
    if (p := rule.known_p(progress)) is not None:
        table, power_T = tabulate_order(clipped.x_T, segment_T, num_trajectories, **counted, p=p)
        sums = OneOrder(p, sum_over_shards(table)[1:])
        p_N = torch.full_like(sums.length_N, p)
    else:
        table = tabulate(clipped.x_T, segment_T, num_trajectories, **counted, interval=config.interval)
        sums = PowerSums.read(sum_over_shards(table), config.interval)
        p_N, target_N = rule.choose(sums, sums.clip_fraction_N)
    return _Chosen(sums, p_N, target_N, *sums.at(p_N), power_T)


def _aggregate(
    chosen: _Chosen, advantage_N: torch.Tensor, weight_N: torch.Tensor, usable_N: torch.Tensor, config: ObjectiveConfig
) -> _Mean:
    """loss = -sum c A M_p, and for its derivative -c A M w[t] with w[t] = exp(p x[t]) / sum exp(p x) all but exp(p x[t])."""
    sums, power_mean_N = chosen.sums, torch.exp(chosen.log_power_mean_N)
    counts_N = (sums.length_N > 0) & (sums.non_finite_N == 0) & usable_N
    value_N, passes_N, clip_fraction_N = power_mean_N, counts_N, sums.clip_fraction_N
    if config.clip_level == "sequence":
        value_N, binds_N = _clip_power_mean(power_mean_N, advantage_N, config)
        passes_N, clip_fraction_N = counts_N & ~binds_N, (binds_N & counts_N).double()
    scale_N = weight_N * advantage_N
    loss = -(torch.where(counts_N, scale_N * value_N, 0.0)).sum()
    share_N = -scale_N * torch.exp(-chosen.log_mean_N) * power_mean_N / sums.length_N.clamp(min=1)
    return _Mean(loss, power_mean_N, clip_fraction_N, torch.where(passes_N, share_N, 0.0))


def _differentiate(
    clipped: _Clipped, segment_T: torch.Tensor, chosen: _Chosen, mean: _Mean, token_weights_T: torch.Tensor | None
) -> torch.Tensor:
    """d loss / d log_ratio [T] for this rank's tokens; clipped ones, and those beyond the clamp, pass none."""
    power_T = chosen.power_T
    if power_T is None:
        power_T = _of_token(chosen.p_N, segment_T).mul_(clipped.x_T).exp_()
    coefficient_T = _of_token(mean.share_N, segment_T).mul_(power_T).mul_(clipped.within_T & ~clipped.binds_T)
    if token_weights_T is not None:
        coefficient_T.mul_(torch.where(clipped.finite_T, token_weights_T.detach(), 0.0))
    return coefficient_T


def _check_arguments(
    tokens: dict[str, torch.Tensor | None], advantages_N: torch.Tensor, weights_N: torch.Tensor, progress: float
) -> None:
    """What would be broadcast or rounded silently is an error that names the argument."""
    length = tokens["log_probs_T"].numel()
    for name, values in tokens.items():
        if values is not None and tuple(values.shape) != (length,):
            raise ConfigError(name, f"has shape {tuple(values.shape)}; log_probs_T has {length} tokens in one dimension")
        if name.endswith("log_probs_T") and values.dtype not in (torch.float32, torch.float64):
            raise ConfigError(name, f"is {values.dtype}, in which ratios near 1 are lost; float32 or float64 is right")
    for name, values in (("advantages_N", advantages_N), ("weights_N", weights_N)):
        if tuple(values.shape) != (advantages_N.numel(),):
            raise ConfigError(name, f"has shape {tuple(values.shape)}; advantages_N has {advantages_N.numel()} trajectories")
    if not 0 <= progress <= 1:
        raise ConfigError("progress", f"{progress} must lie in [0, 1]: the share of training that is done")


class _Surrogate(torch.autograd.Function):
    """sum_t coefficient[t] * log_ratio[t], whose gradient with respect to the log-probs is the coefficients."""

    @staticmethod
    def forward(ctx, log_probs_T: torch.Tensor, coefficient_T: torch.Tensor, log_ratio_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(coefficient_T.to(log_probs_T.dtype))
        return torch.dot(coefficient_T, log_ratio_T).to(log_probs_T.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient * ctx.saved_tensors[0], None, None


def _of_token(values_N: torch.Tensor, segment_T: torch.Tensor) -> torch.Tensor:
    """Each token's trajectory's value, [T]; 0 for tokens of none."""
    return torch.cat([values_N.new_zeros(1), values_N]).index_select(0, segment_T)


def _log_ratios(
    log_probs_T: torch.Tensor, old_log_probs_T: torch.Tensor, token_weights_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float64 [T], clamped and 0 where not finite; whether all of a token is finite; whether the clamp passes a gradient)."""
    difference_T = log_probs_T - old_log_probs_T
    finite_T = (difference_T - difference_T) == 0  # as isfinite(), which takes five times as long on CPU
    within_T = difference_T.abs() <= LOG_RATIO_LIMIT
    if token_weights_T is not None:
        finite_T = finite_T & token_weights_T.isfinite()
        difference_T = torch.where(finite_T, difference_T, 0.0)
    bounded_T = difference_T.nan_to_num(0.0, 0.0, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return bounded_T.double(), finite_T, within_T


def _clip_power_mean(
    power_mean_N: torch.Tensor, advantage_N: torch.Tensor, config: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence-level clip: M of min(M*A, clip(M)*A), and where the bound binds and no gradient flows."""
    low, high = (math.exp(bound) for bound in config.log_bounds)
    binds_N = ((advantage_N > 0) & (power_mean_N > high)) | ((advantage_N < 0) & (power_mean_N < low))
    return torch.where(binds_N, power_mean_N.clamp(low, high), power_mean_N), binds_N
