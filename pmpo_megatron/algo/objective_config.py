"""What the objective is made of: its settings, which of them go together, and the usual combinations by name."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pmpo_megatron.algo.exponent import ExponentRule
from pmpo_megatron.algo.power_sums import LOG_RATIO_LIMIT, OrderInterval
from pmpo_megatron.config import Section, setting, unknown_key
from pmpo_megatron.errors import ConfigError

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
        _check_corrections(self)

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


def _check_corrections(config: ObjectiveConfig) -> None:
    if config.kl_estimator != "k3" and not config.kl_coefficient:
        raise ConfigError("kl_estimator", f"{config.kl_estimator!r} has no effect without kl_coefficient above 0")
    if config.importance_cap != 2.0 and config.importance == "none":
        raise ConfigError("importance_cap", f"{config.importance_cap:g} has no effect with importance 'none'")


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
