"""The PMPO objective: clip, choose p, aggregate by the power mean, and give a gradient that is right on any sharding.

Source: arXiv 2601.22521. The mathematics is in docs/objective.md, "The formulas". One call makes one collective: each rank
tabulates its own tokens (`power_sums.tabulate`), the table is summed over the ranks that share the trajectories, and
everything after that - p, ESS, M_p, the loss - is the same arithmetic on every rank.

Legend: N trajectories, T tokens on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pmpo_megatron.algo.clips import Tokens
from pmpo_megatron.algo.objective_config import PRESETS, ObjectiveConfig
from pmpo_megatron.algo.one_order import OneOrder, tabulate_order
from pmpo_megatron.algo.power_sums import PowerSums, tabulate
from pmpo_megatron.algo.sums import LOG_RATIO_LIMIT, TrajectorySums
from pmpo_megatron.errors import ConfigError, NonFiniteError

__all__ = ["PRESETS", "ObjectiveConfig", "ObjectiveOutput", "evaluate_objective"]


@dataclass(frozen=True)
class ObjectiveOutput:
    """What `evaluate_objective` returns. All but ``surrogate`` is detached and equal on all shards; [N] are float64.

    Attributes:
        loss: 0-d, -sum_i c_i A_i M_i over the N trajectories (count it once when shards are reduced).
        surrogate: 0-d; its gradient with respect to ``log_probs_T`` is the loss's, for this rank's tokens.
        p_N: the order of each trajectory.
        ess_N, target_ess_N: achieved and wanted effective sample size in tokens, in [1, T_i]; where the rule has no
            target, the achieved one.
        clip_fraction_N: clipped tokens over T_i; at clip level sequence 1 where the bound on M_p binds.
        length_N: T_i over all shards.
        power_mean_N: M_p before any sequence-level clip; 1 for a trajectory without tokens.
        non_finite_N: bool, NaN or inf came in, or weight x advantage is too large for a gradient: the trajectory contributes
            nothing here; see `raise_if_non_finite`.
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
        indices = self.non_finite_N.nonzero().flatten().tolist()
        if indices:
            which = [names[i] if names else i for i in indices[:8]]
            more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
            problem = "NaN or inf in the log-probs, advantage or weight, or an overflow of weight x advantage, of trajectory"
            raise NonFiniteError(f"{problem} {which}{more}")


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
    group_statistics: Mapping[str, torch.Tensor] | None = None,
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
        group_statistics: [N] each, what `advantages.group_statistics` says of each trajectory's group, by name; only rules
            that ask for them need them.

    Raises:
        ConfigError: shapes or types that do not belong together, log-probs of less than float32's precision, a progress
            beyond [0, 1], or statistics that the rule needs and that are missing. Nothing of a tensor's content is looked at,
            which would synchronise; an index outside [-1, N) is noticed by the kernels that use it, and named on a CPU (a GPU
            ends the process with its own assertion).
    """
    tokens_T = {"log_probs_T": log_probs_T, "old_log_probs_T": old_log_probs_T}
    of_N = {"advantages_N": advantages_N, "weights_N": weights_N, **(group_statistics or {})}
    _check_arguments(tokens_T, trajectory_T, token_weights_T, of_N, progress)
    statistics = _read_statistics(config, group_statistics or {})
    scale_N, usable_N = _scales(advantages_N.detach().double(), weights_N.detach().double(), log_probs_T.dtype)
    with _naming_bad_indices(trajectory_T, len(advantages_N)):
        read = _read_tokens(log_probs_T.detach(), old_log_probs_T.detach(), trajectory_T, token_weights_T, advantages_N)
        x_T, clipped_T = config.token_clip.clip(read.tokens)
        flag_T = read.poison_T.add_(clipped_T)
        chosen = _choose_order(x_T, flag_T, read.tokens, config, progress, sum_over_shards, statistics)
    mean = _aggregate(chosen, scale_N, usable_N, config)
    within_T = read.within_T
    passes_T = within_T if config.token_clip.clipped_pass_gradient else within_T.addcmul_(within_T, clipped_T, value=-1)
    coefficient_T = _differentiate(x_T, passes_T, read.tokens, chosen, mean, token_weights_T)
    length_N, ess_fraction_N = chosen.sums.length_N, torch.exp(mean.log_ess_fraction_N)
    return ObjectiveOutput(
        loss=mean.loss,
        surrogate=_surrogate(log_probs_T, coefficient_T, read.tokens.log_ratio_T),
        p_N=chosen.p_N,
        ess_N=ess_fraction_N * length_N,
        target_ess_N=(ess_fraction_N if chosen.target_N is None else chosen.target_N) * length_N,
        clip_fraction_N=mean.clip_fraction_N,
        length_N=length_N,
        power_mean_N=mean.power_mean_N,
        non_finite_N=chosen.sums.non_finite_N | ~usable_N,
    )


@dataclass(frozen=True)
class _Chosen:
    """p of each trajectory, its target if it has one, and the sums at p; `power_T` is exp(p * x) if it is known."""

    sums: TrajectorySums
    p_N: torch.Tensor
    target_N: torch.Tensor | None
    power_T: torch.Tensor | None


@dataclass(frozen=True)
class _Mean:
    """M_p, its part in the loss, and what a token's gradient is multiplied with besides its exp(p * x)."""

    loss: torch.Tensor
    power_mean_N: torch.Tensor
    log_ess_fraction_N: torch.Tensor
    clip_fraction_N: torch.Tensor
    share_N: torch.Tensor


def _choose_order(
    x_T: torch.Tensor,
    flag_T: torch.Tensor,
    tokens: Tokens,
    config: ObjectiveConfig,
    progress: float,
    sum_over_shards: Callable[[torch.Tensor], torch.Tensor],
    statistics: Mapping[str, torch.Tensor],
) -> _Chosen:
    """p by the rule, from the one collective: of sums at a p that is known beforehand, else of sums for all orders."""
    rule, (count,) = config.exponent_rule, tokens.advantage_N.shape
    if (p := rule.known_p(progress)) is not None:
        table, power_T = tabulate_order(x_T, flag_T, tokens.segment_T, count, p=p)
        one = OneOrder.read(sum_over_shards(table), p)
        return _Chosen(one, torch.full_like(one.length_N, p), None, power_T)
    table = tabulate(x_T, flag_T, tokens.segment_T, count, interval=config.interval)
    sums = PowerSums.read(sum_over_shards(table), config.interval, statistics)
    return _Chosen(sums, *rule.choose(sums, sums.clip_fraction_N), None)


def _aggregate(chosen: _Chosen, scale_N: torch.Tensor, usable_N: torch.Tensor, config: ObjectiveConfig) -> _Mean:
    """loss = -sum c A M_p, and for its derivative -c A M w[t] with w[t] = exp(p x[t]) / sum exp(p x) all but exp(p x[t])."""
    sums = chosen.sums
    log_mean_N, log_power_mean_N, log_ess_fraction_N = sums.at(chosen.p_N)
    counts_N = usable_N & (sums.length_N > 0) & ~sums.non_finite_N
    scale_N = torch.where(counts_N, scale_N, 0.0)
    power_mean_N = value_N = torch.exp(log_power_mean_N)
    share_N = -scale_N * torch.exp(-log_mean_N) * power_mean_N / sums.length_N.clamp(min=1)
    clip_fraction_N = sums.clip_fraction_N
    if config.clip_level == "sequence":  # M of min(M A, clip(M) A): where the bound binds, no gradient flows
        low, high = (math.exp(bound) for bound in config.log_bounds)
        binds_N = ((scale_N > 0) & (power_mean_N > high)) | ((scale_N < 0) & (power_mean_N < low))
        value_N = torch.where(binds_N, power_mean_N.clamp(low, high), power_mean_N)
        share_N, clip_fraction_N = torch.where(binds_N, 0.0, share_N), binds_N.double()
    return _Mean(-(scale_N * value_N).sum(), power_mean_N, log_ess_fraction_N, clip_fraction_N, share_N)


def _differentiate(
    x_T: torch.Tensor,
    passes_T: torch.Tensor,
    tokens: Tokens,
    chosen: _Chosen,
    mean: _Mean,
    token_weights_T: torch.Tensor | None,
) -> torch.Tensor:
    """d loss / d log_ratio [T] for this rank's tokens; those with 0 in ``passes_T`` pass none."""
    power_T = chosen.power_T
    if power_T is None:
        power_T = tokens.of_trajectory(chosen.p_N).mul_(x_T).exp_()
    coefficient_T = tokens.of_trajectory(mean.share_N).mul_(power_T).mul_(passes_T)
    if token_weights_T is not None:
        coefficient_T.mul_(token_weights_T.detach().nan_to_num(0.0, 0.0, 0.0))
    return coefficient_T


class _Surrogate(torch.autograd.Function):
    """sum_t coefficient[t] * log_ratio[t], whose gradient with respect to the log-probs is the coefficients."""

    @staticmethod
    def forward(ctx: Any, log_probs_T: torch.Tensor, coefficient_T: torch.Tensor, log_ratio_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(coefficient_T.to(log_probs_T.dtype))
        return torch.dot(coefficient_T, log_ratio_T).to(log_probs_T.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None


_surrogate: Callable[..., torch.Tensor] = _Surrogate.apply  # PyTorch says no type of its own


@dataclass(frozen=True)
class _Read:
    """Tokens; 1, or 0 where the clamp of a log-ratio binds; 0, or NaN where a token is not finite: [T]."""

    tokens: Tokens
    within_T: torch.Tensor
    poison_T: torch.Tensor


def _read_tokens(
    log_probs_T: torch.Tensor,
    old_log_probs_T: torch.Tensor,
    trajectory_T: torch.Tensor,
    token_weights_T: torch.Tensor | None,
    advantages_N: torch.Tensor,
) -> _Read:
    difference_T = log_probs_T - old_log_probs_T
    poison_T = difference_T - difference_T
    if token_weights_T is not None:
        poison_T = poison_T + (token_weights_T.detach() - token_weights_T.detach())
    difference_T = difference_T.nan_to_num_(0.0, 0.0, 0.0)
    bounded_T = difference_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    advantage_N = advantages_N.detach().double()
    tokens = Tokens(bounded_T.double(), log_probs_T, old_log_probs_T, advantage_N, trajectory_T + 1)
    return _Read(tokens, difference_T.sub_(bounded_T).sign_().square_().neg_().add_(1), poison_T)


def _scales(advantage_N: torch.Tensor, weight_N: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(c_i A_i, whether it is finite and so far from ``dtype``'s end that no ratio can make it overflow)."""
    scale_N = weight_N * advantage_N
    return scale_N, scale_N.abs() <= torch.finfo(dtype).max * math.exp(-LOG_RATIO_LIMIT)


def _check_arguments(
    tokens_T: dict[str, torch.Tensor],
    trajectory_T: torch.Tensor,
    token_weights_T: torch.Tensor | None,
    of_N: dict[str, torch.Tensor],
    progress: float,
) -> None:
    """What would be broadcast or rounded silently is an error that names the argument."""
    length, count = tokens_T["log_probs_T"].numel(), of_N["advantages_N"].numel()
    weights_T = {} if token_weights_T is None else {"token_weights_T": token_weights_T}
    for name, values in (tokens_T | {"trajectory_T": trajectory_T} | weights_T).items():
        if tuple(values.shape) != (length,):
            raise ConfigError(name, f"has shape {tuple(values.shape)}; log_probs_T has {length} tokens in one dimension")
    for name, values in tokens_T.items():
        if values.dtype not in (torch.float32, torch.float64):
            raise ConfigError(name, f"is {values.dtype}, in which ratios near 1 are lost; float32 or float64 is right")
    if trajectory_T.dtype != torch.int64:
        raise ConfigError("trajectory_T", f"is {trajectory_T.dtype}; int64 is right, with -1 for what is no response token")
    for name, values in of_N.items():
        if tuple(values.shape) != (count,):
            raise ConfigError(name, f"has shape {tuple(values.shape)}; advantages_N has {count} trajectories")
    if not 0 <= progress <= 1:
        raise ConfigError("progress", f"{progress} must lie in [0, 1]: the share of training that is done")


def _read_statistics(config: ObjectiveConfig, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name in config.exponent_rule.group_statistics:
        if name not in statistics:
            raise ConfigError("group_statistics", f"lacks {name!r}, which rule {config.rule!r} needs")
    return {name: values_N.detach().double() for name, values_N in statistics.items()}


@contextmanager
def _naming_bad_indices(trajectory_T: torch.Tensor, num_trajectories: int) -> Iterator[None]:
    """Looks at the indices only where a kernel has refused one, so that good ones cost nothing."""
    try:
        yield
    except (IndexError, RuntimeError):
        if trajectory_T.numel():
            least, most = int(trajectory_T.min()), int(trajectory_T.max())
            if least < -1 or most >= num_trajectories:
                problem = f"holds {least if least < -1 else most}; right is 0 to {num_trajectories - 1}, the trajectory"
                raise ConfigError("trajectory_T", f"{problem}, or -1, no response token") from None
        raise
