"""The PMPO objective: clip, choose p, aggregate by the power mean, and give a gradient that is right on any sharding.

Source: arXiv 2601.22521; objective.md's sections are cited as (section n). One call makes one collective: each rank
tabulates its own tokens (`power_sums.tabulate`), the table is summed over the ranks that share the trajectories, and
everything after that - p, ESS, M_p, the loss - is the same arithmetic on every rank.

Legend: N trajectories, T tokens on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pmpo_megatron.algo.exponent import ExponentRule, exponents
from pmpo_megatron.algo.power_sums import CLIPPED, LOG_RATIO_LIMIT, NON_FINITE, OrderInterval, PowerSums, tabulate
from pmpo_megatron.config import Section, setting, unknown_key
from pmpo_megatron.errors import ConfigError, NonFiniteError

BOUNDS = ("eps_low_log", "eps_high_log", "eps_low_ratio", "eps_high_ratio")
P_LIMIT = 10.0  # |2p * log-ratio| <= 400 keeps exp within float64


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """What is optimised. `PRESETS` names the usual combinations; in YAML `preset: grpo` is the base that other keys change."""

    rule: str = setting("ess", "how p is chosen", choices=("ess", "ess_floor", "linear", "fixed", "schedule"))
    p: float | None = setting(None, "rule fixed: the order", minimum=-P_LIMIT, maximum=P_LIMIT)
    p_min: float | None = setting(None, "rules linear, ess_floor: least p (0)", minimum=-P_LIMIT, maximum=P_LIMIT)
    p_max: float | None = setting(None, "rules linear, ess_floor: largest p (1)", minimum=-P_LIMIT, maximum=P_LIMIT)
    p_start: float | None = setting(None, "rule schedule: p at the beginning", minimum=-P_LIMIT, maximum=P_LIMIT)
    p_end: float | None = setting(None, "rule schedule: p at the end", minimum=-P_LIMIT, maximum=P_LIMIT)
    ess_floor: float | None = setting(None, "rule ess_floor: target ESS of an unclipped trajectory", unit="of its length")
    clip_level: str = setting("token", "what is clipped: each token's ratio, or M_p", choices=("token", "sequence"))
    eps_low_log: float | None = setting(0.4, "lower clip bound", unit="log-ratio", above=0.0, maximum=LOG_RATIO_LIMIT)
    eps_high_log: float | None = setting(0.4, "upper clip bound", unit="log-ratio", above=0.0, maximum=LOG_RATIO_LIMIT)
    eps_low_ratio: float | None = setting(None, "lower clip bound: ratios from 1 - eps", unit="ratio", above=0.0)
    eps_high_ratio: float | None = setting(None, "upper clip bound: ratios to 1 + eps", unit="ratio", above=0.0)
    trajectory_weight: str = setting("uniform", "c_i (section 4)", choices=("uniform", "length", "constant"))
    advantage: str = setting("grpo", "advantage within a group", choices=("grpo", "dr_grpo", "rloo"))
    kl_coefficient: float = setting(0.0, "weight of the KL to the reference model; 0: no reference", minimum=0.0)
    kl_estimator: str = setting("k3", "estimator of that KL", choices=("k1", "k2", "k3"))
    entropy_coefficient: float = setting(0.0, "weight of the entropy bonus", minimum=0.0)
    importance: str = setting("none", "correction for the engine's log-probs", choices=("none", "token", "sequence"))
    importance_cap: float = setting(2.0, "truncation of that correction", unit="ratio", minimum=1.0)

    def validate(self) -> None:
        _check_rule(self)
        _check_bounds(self)

    @classmethod
    def base_for(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of the preset that ``values`` names; bounds in one unit replace the preset's in the other."""
        name = values.pop("preset", None)
        if name is None:
            base = {}
        elif name in PRESETS:
            base = asdict(PRESETS[name])
        else:
            raise unknown_key("preset", str(name), list(PRESETS))
        given = {unit for unit in ("log", "ratio") if any(k.startswith("eps_") and k.endswith(unit) for k in values)}
        if len(given) == 1:
            other = ({"log", "ratio"} - given).pop()
            base |= {f"eps_low_{other}": None, f"eps_high_{other}": None}
        if "rule" in values and values["rule"] != base.get("rule", "ess"):
            base |= dict.fromkeys(("p", "p_min", "p_max", "p_start", "p_end", "ess_floor"))
        return base

    @property
    def log_bounds(self) -> tuple[float, float]:
        """(low, high) of the clip in log space: low < 0 < high."""
        if self.eps_low_log is not None:
            return -self.eps_low_log, self.eps_high_log
        return math.log1p(-self.eps_low_ratio), math.log1p(self.eps_high_ratio)

    @property
    def exponent_rule(self) -> ExponentRule:
        given = {name: getattr(self, name) for name in ("p", "p_min", "p_max", "p_start", "p_end", "ess_floor")}
        return ExponentRule(self.rule, **{name: value for name, value in given.items() if value is not None})

    @property
    def interval(self) -> OrderInterval:
        """The orders that p, and 2p for the ESS, can reach."""
        rule = self.exponent_rule
        reach = {"fixed": (rule.p, rule.p), "schedule": (rule.p_start, rule.p_end)}.get(rule.name, (rule.p_min, rule.p_max))
        return OrderInterval.covering(min(reach), max(reach))


USES = {
    "ess": (),
    "ess_floor": ("ess_floor", "p_min", "p_max"),
    "linear": ("p_min", "p_max"),
    "fixed": ("p",),
    "schedule": ("p_start", "p_end"),
}
REQUIRED = {"ess_floor": ("ess_floor",), "fixed": ("p",), "schedule": ("p_start", "p_end")}


def _check_rule(config: ObjectiveConfig) -> None:
    rule = config.rule
    for name in ("p", "p_min", "p_max", "p_start", "p_end", "ess_floor"):
        if getattr(config, name) is not None and name not in USES[rule]:
            users = [other for other, names in USES.items() if name in names]
            raise ConfigError(name, f"has no effect with rule {rule!r}; it belongs to {', '.join(users)}")
    for name in REQUIRED.get(rule, ()):
        if getattr(config, name) is None:
            raise ConfigError(name, f"is required by rule {rule!r}")
    parameters = config.exponent_rule
    if rule in ("linear", "ess_floor") and parameters.p_min > parameters.p_max:
        raise ConfigError("p_min", f"{parameters.p_min} is above p_max = {parameters.p_max}")
    if rule == "ess_floor":
        if not 0 < parameters.ess_floor <= 1:
            raise ConfigError("ess_floor", f"{parameters.ess_floor} must lie in (0, 1], a fraction of the length")
        if parameters.p_min < 0:
            raise ConfigError("p_min", f"{parameters.p_min} must be at least 0: the ESS falls with |p|, so it fixes only |p|")
    if config.clip_level == "sequence" and rule not in ("fixed", "schedule"):
        raise ConfigError(
            "rule", f"{rule!r} chooses p by the fraction of clipped tokens, but clip_level 'sequence' clips no token"
        )


def _check_bounds(config: ObjectiveConfig) -> None:
    given = [name for name in BOUNDS if getattr(config, name) is not None]
    if given not in (["eps_low_log", "eps_high_log"], ["eps_low_ratio", "eps_high_ratio"]):
        raise ConfigError(
            given[-1] if given else "eps_low_log",
            f"give eps_low_log and eps_high_log, or eps_low_ratio and eps_high_ratio, not {given}",
        )
    if config.eps_low_ratio is not None:
        if config.eps_low_ratio >= 1:
            raise ConfigError(
                "eps_low_ratio",
                f"{config.eps_low_ratio} would allow any ratio above 0; below 1 is right, or use eps_low_log",
            )
        if config.eps_high_ratio > math.expm1(LOG_RATIO_LIMIT):
            raise ConfigError("eps_high_ratio", f"{config.eps_high_ratio} is above e^{LOG_RATIO_LIMIT:.0f}, where ratios end")


_RATIO = {"eps_low_log": None, "eps_high_log": None}
PRESETS: dict[str, ObjectiveConfig] = {
    "pmpo": ObjectiveConfig(),
    "gmpo": ObjectiveConfig(rule="fixed", p=0.0),
    "hmpo": ObjectiveConfig(rule="fixed", p=-1.0),
    "grpo": ObjectiveConfig(rule="fixed", p=1.0, **_RATIO, eps_low_ratio=0.2, eps_high_ratio=0.2),
    "dr_grpo": ObjectiveConfig(
        rule="fixed",
        p=1.0,
        **_RATIO,
        eps_low_ratio=0.2,
        eps_high_ratio=0.2,
        trajectory_weight="constant",
        advantage="dr_grpo",
    ),
    "dapo": ObjectiveConfig(rule="fixed", p=1.0, **_RATIO, eps_low_ratio=0.2, eps_high_ratio=0.28, trajectory_weight="length"),
    "gspo": ObjectiveConfig(rule="fixed", p=0.0, clip_level="sequence", **_RATIO, eps_low_ratio=3e-4, eps_high_ratio=4e-4),
    "holder": ObjectiveConfig(
        rule="schedule",
        p_start=2.0,
        p_end=-2.0,
        clip_level="sequence",
        **_RATIO,
        eps_low_ratio=0.2,
        eps_high_ratio=0.2,
    ),
}


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
        weights_N: [N], c_i of the whole optimizer step (section 4): the only denominator.
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
    num_trajectories = advantages_N.numel()
    advantage_N, weight_N = advantages_N.detach().double(), weights_N.detach().double()
    usable_N = advantage_N.isfinite() & weight_N.isfinite()
    advantage_N, weight_N = torch.where(usable_N, advantage_N, 0.0), torch.where(usable_N, weight_N, 0.0)
    segment_T = trajectory_T.clamp(min=-1) + 1

    difference_T = log_probs_T.detach() - old_log_probs_T.detach()
    finite_T = (difference_T - difference_T) == 0  # as isfinite(), which takes five times as long on CPU
    within_T = difference_T.abs() <= LOG_RATIO_LIMIT  # where the clamp passes a gradient
    if token_weights_T is not None:
        finite_T = finite_T & token_weights_T.isfinite()
        difference_T = torch.where(finite_T, difference_T, 0.0)
    log_ratio_T = difference_T.nan_to_num(0.0, 0.0, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).double()
    x_T, clipped_T = _clip(log_ratio_T, advantage_N, segment_T, config)

    table = tabulate(x_T, segment_T, num_trajectories, clipped_T=clipped_T, finite_T=finite_T, interval=config.interval)
    sums = PowerSums.read(sum_over_shards(table), config.interval)
    length_N = sums.length_N
    clip_fraction_N = sums.moments[:, CLIPPED] / length_N.clamp(min=1)
    non_finite_N = (sums.moments[:, NON_FINITE] > 0) | ~usable_N

    p_N, target_N = exponents(config.exponent_rule, sums, clip_fraction_N, progress)
    log_mean_N, log_power_mean_N, log_ess_fraction_N = sums.at(p_N)
    power_mean_N, ess_fraction_N = torch.exp(log_power_mean_N), torch.exp(log_ess_fraction_N)

    value_N, counts_N = power_mean_N, (length_N > 0) & ~non_finite_N
    passes_N = counts_N
    if config.clip_level == "sequence":
        value_N, binds_N = _clip_power_mean(power_mean_N, advantage_N, config)
        passes_N, clip_fraction_N = counts_N & ~binds_N, (binds_N & counts_N).double()
    scale_N = weight_N * advantage_N
    loss = -(torch.where(counts_N, scale_N * value_N, 0.0)).sum()

    # d loss / d log_ratio[t] = -c A M w[t], with w[t] = exp(p x[t]) / sum exp(p x) (section 2); clipped tokens pass none.
    share_N = torch.where(passes_N, -scale_N * torch.exp(-log_mean_N) * power_mean_N / length_N.clamp(min=1), 0.0)
    coefficient_T = _of_token(p_N, segment_T).mul_(x_T).exp_()
    coefficient_T.mul_(_of_token(share_N, segment_T)).mul_(within_T & ~clipped_T)
    if token_weights_T is not None:
        coefficient_T.mul_(torch.where(finite_T, token_weights_T.detach(), 0.0))
    surrogate = _Surrogate.apply(log_probs_T, coefficient_T, log_ratio_T)

    return ObjectiveOutput(
        loss=loss,
        surrogate=surrogate,
        p_N=p_N,
        ess_N=ess_fraction_N * length_N,
        target_ess_N=(ess_fraction_N if target_N is None else target_N) * length_N,
        clip_fraction_N=clip_fraction_N,
        length_N=length_N,
        power_mean_N=power_mean_N,
        non_finite_N=non_finite_N,
    )


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


def _clip(
    log_ratio_T: torch.Tensor, advantage_N: torch.Tensor, segment_T: torch.Tensor, config: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-level clip, one-sided by the advantage's sign (section 1): (clipped log-ratios [T], where it binds [T])."""
    if config.clip_level == "sequence":
        return log_ratio_T, torch.zeros_like(log_ratio_T, dtype=torch.bool)
    low, high = config.log_bounds  # float64, as full_like makes them; torch.where of two numbers would be float32
    upper_N = torch.full_like(advantage_N, high).masked_fill(advantage_N <= 0, math.inf)
    lower_N = torch.full_like(advantage_N, low).masked_fill(advantage_N >= 0, -math.inf)
    bounded_T = torch.minimum(log_ratio_T, _of_token(upper_N, segment_T)).maximum(_of_token(lower_N, segment_T))
    return bounded_T, bounded_T != log_ratio_T


def _clip_power_mean(
    power_mean_N: torch.Tensor, advantage_N: torch.Tensor, config: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence-level clip: M of min(M*A, clip(M)*A), and where the bound binds and no gradient flows."""
    low, high = (math.exp(bound) for bound in config.log_bounds)
    binds_N = ((advantage_N > 0) & (power_mean_N > high)) | ((advantage_N < 0) & (power_mean_N < low))
    return torch.where(binds_N, power_mean_N.clamp(low, high), power_mean_N), binds_N
