"""What the objective is made of: its settings, which of them go together, and the usual combinations by name."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, make_dataclass
from functools import cached_property
from typing import Any

from pmpo_megatron.algo.power_sums import LOG_RATIO_LIMIT, OrderInterval
from pmpo_megatron.algo.rules import P_LIMIT, RULES, Rule, find_rule, make_rule, parameter_fields
from pmpo_megatron.config import Section, setting, unknown_key
from pmpo_megatron.errors import ConfigError

BOUNDS = ("eps_low_log", "eps_high_log", "eps_low_ratio", "eps_high_ratio")

# The parameters of all rules as fields beside the others, each declared by its rule's class alone.
_RuleParameters = make_dataclass("_RuleParameters", parameter_fields(), bases=(Section,), frozen=True, kw_only=True)
PARAMETERS = tuple(item.name for item in fields(_RuleParameters))


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(_RuleParameters):
    """What is optimised. `PRESETS` names the usual combinations; in YAML `preset: grpo` is the base that other keys change."""

    rule: str = setting("ess", f"how p is chosen: {', '.join(RULES)}, or package.module:Name of your own")
    rule_parameters: dict[str, Any] = setting({}, "parameters of a rule of your own, by name")
    clip_level: str = setting("token", "what is clipped: each token's ratio, or M_p", choices=("token", "sequence"))
    eps_low_log: float | None = setting(0.4, "lower clip bound", unit="log-ratio", above=0.0, maximum=LOG_RATIO_LIMIT)
    eps_high_log: float | None = setting(0.4, "upper clip bound", unit="log-ratio", above=0.0, maximum=LOG_RATIO_LIMIT)
    eps_low_ratio: float | None = setting(None, "lower clip bound: ratios from 1 - eps", unit="ratio", above=0.0)
    eps_high_ratio: float | None = setting(None, "upper clip bound: ratios to 1 + eps", unit="ratio", above=0.0)
    trajectory_weight: str = setting(
        "uniform", "weight c_i of a trajectory in the step", choices=("uniform", "length", "constant")
    )
    advantage: str = setting("grpo", "advantage within a group", choices=("grpo", "dr_grpo", "rloo"))
    kl_coefficient: float = setting(0.0, "weight of the KL to the reference model; 0: no reference", minimum=0.0)
    kl_estimator: str = setting("k3", "estimator of that KL", choices=("k1", "k2", "k3"))
    entropy_coefficient: float = setting(0.0, "weight of the entropy bonus", minimum=0.0)
    importance: str = setting("none", "correction for the engine's log-probs", choices=("none", "token", "sequence"))
    importance_cap: float = setting(2.0, "truncation of that correction", unit="ratio", minimum=1.0)

    def __hash__(self) -> int:  # all but the mapping, which has none
        return hash(tuple(getattr(self, item.name) for item in fields(self) if item.name != "rule_parameters"))

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
        rule = values.get("rule")
        if isinstance(rule, str) and rule != base.get("rule", "ess"):
            find_rule(rule)  # which says more than the first of its parameters that is not known
            base |= dict.fromkeys(PARAMETERS) | {"rule_parameters": {}}
        return base

    @property
    def log_bounds(self) -> tuple[float, float]:
        """(low, high) of the clip in log space: low < 0 < high."""
        if self.eps_low_log is not None:
            return -self.eps_low_log, self.eps_high_log
        return math.log1p(-self.eps_low_ratio), math.log1p(self.eps_high_ratio)

    @cached_property
    def exponent_rule(self) -> Rule:
        given = {name: value for name in PARAMETERS if (value := getattr(self, name)) is not None}
        return make_rule(self.rule, given, self.rule_parameters)

    @cached_property
    def interval(self) -> OrderInterval:
        """The orders that p, and 2p for the ESS, can reach."""
        return OrderInterval.covering(*self.exponent_rule.p_range())


def _check_rule(config: ObjectiveConfig) -> None:
    if config.exponent_rule.known_p(0.0) is None and config.clip_level == "sequence":
        raise ConfigError(
            "rule", f"{config.rule!r} chooses p by the clipped tokens of a trajectory, but clip_level 'sequence' clips no token"
        )
    low, high = config.exponent_rule.p_range()
    if not -P_LIMIT <= low <= high <= P_LIMIT:
        raise ConfigError("rule", f"{config.rule!r} chooses p in [{low}, {high}], which must lie in +-{P_LIMIT:g}")


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
