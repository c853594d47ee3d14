"""What the objective is made of: its settings, which of them go together, and the usual combinations by name."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from pmpo_megatron.algo.advantages import ADVANTAGES, STATISTICS, Advantage, make_advantage
from pmpo_megatron.algo.clips import CLIPS, Bounded, Clip, Unclipped, Weight
from pmpo_megatron.algo.named import find_class, make_instance
from pmpo_megatron.algo.power_sums import OrderInterval
from pmpo_megatron.algo.rules import P_LIMIT, RULES, Rule, find_rule, make_rule, optional_parameter
from pmpo_megatron.algo.sums import LOG_RATIO_LIMIT
from pmpo_megatron.config import Section, setting, unknown_key
from pmpo_megatron.errors import ConfigError

BOUNDS = ("eps_low_log", "eps_high_log", "eps_low_ratio", "eps_high_ratio")
OWN = "or package.module:Name of your own"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """What is optimised. `PRESETS` names the usual combinations; in YAML `preset: grpo` is the base that other keys change."""

    # Parameters of the rules for p: their meaning, range and default stand in the rules' classes.
    ess_target: float | None = optional_parameter("ess_target")
    clip_reference: float | None = optional_parameter("clip_reference")
    p_min: float | None = optional_parameter("p_min")
    p_max: float | None = optional_parameter("p_max")
    p: float | None = optional_parameter("p")
    p_start: float | None = optional_parameter("p_start")
    p_end: float | None = optional_parameter("p_end")

    rule: str = setting("ess", f"how p is chosen: {', '.join(RULES)}, {OWN}")
    rule_parameters: dict[str, Any] = setting({}, "parameters of a rule of your own, by name")
    clip: str = setting("one_sided", f"how tokens are clipped: {', '.join(CLIPS)}, {OWN}")
    clip_parameters: dict[str, Any] = setting({}, "parameters of clip divergence, low and high, or of your own, by name")
    clip_level: str = setting("token", "what is clipped: each token's ratio, or M_p", choices=("token", "sequence"))
    eps_low_log: float | None = setting(0.4, "lower clip bound", unit="log-ratio", above=0.0, maximum=LOG_RATIO_LIMIT)
    eps_high_log: float | None = setting(0.4, "upper clip bound", unit="log-ratio", above=0.0, maximum=LOG_RATIO_LIMIT)
    eps_low_ratio: float | None = setting(None, "lower clip bound: ratios from 1 - eps", unit="ratio", above=0.0)
    eps_high_ratio: float | None = setting(None, "upper clip bound: ratios to 1 + eps", unit="ratio", above=0.0)
    trajectory_weight: str = setting(
        "uniform", "weight c_i of a trajectory in the step", choices=("uniform", "length", "constant")
    )
    advantage: str = setting("grpo", f"advantage within a group: {', '.join(ADVANTAGES)}, {OWN}")
    advantage_parameters: dict[str, Any] = setting({}, "parameters of an advantage of your own, by name")
    kl_coefficient: float = setting(0.0, "weight of the KL to the reference model; 0: no reference", minimum=0.0)
    kl_estimator: str = setting("k3", "estimator of that KL", choices=("k1", "k2", "k3"))
    entropy_coefficient: float = setting(0.0, "weight of the entropy bonus", minimum=0.0)
    balance_coefficient: float = setting(
        0.0,
        "weight of the load-balancing loss of each layer with a mixture of experts; its gradient is all that it adds",
        minimum=0.0,
    )
    importance: str = setting("none", "correction for the engine's log-probs", choices=("none", "token", "sequence"))
    importance_cap: float = setting(2.0, "truncation of that correction", unit="ratio", minimum=1.0)

    def __hash__(self) -> int:  # all but the mappings, which have none
        return hash(tuple(getattr(self, item.name) for item in fields(self) if not item.name.endswith("_parameters")))

    def validate(self) -> None:
        _check_rule(self)
        _check_bounds(self)
        _ = self.token_clip, self.group_advantage  # made once, which checks their parameters
        _check_corrections(self)

    @classmethod
    def base_for(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of the preset that ``values`` names; bounds in one unit replace the preset's in the other."""
        name = values.pop("preset", None)
        base: dict[str, Any] = {}
        if name in PRESETS:
            base = asdict(PRESETS[name])
        elif name is not None:
            raise unknown_key("preset", str(name), list(PRESETS))
        given = {unit for unit in ("log", "ratio") if any(k.startswith("eps_") and k.endswith(unit) for k in values)}
        if len(given) == 1:
            other = ({"log", "ratio"} - given).pop()
            base |= {f"eps_low_{other}": None, f"eps_high_{other}": None}
        for field, default in (("rule", "ess"), ("clip", "one_sided"), ("advantage", "grpo")):
            chosen = values.get(field)
            if isinstance(chosen, str) and chosen != base.get(field, default):
                base |= _without_parameters(field, chosen)
        return base

    @property
    def log_bounds(self) -> tuple[float, float]:
        """(low, high) of the clip in log space: low < 0 < high; +-LOG_RATIO_LIMIT where the clip has no such bound."""
        low = high = LOG_RATIO_LIMIT
        if self.eps_high_log is not None:
            high, low = self.eps_high_log, LOG_RATIO_LIMIT if self.eps_low_log is None else self.eps_low_log
        elif self.eps_high_ratio is not None:
            high, low = math.log1p(self.eps_high_ratio), low if self.eps_low_ratio is None else -math.log1p(-self.eps_low_ratio)
        return -low, high

    @cached_property
    def exponent_rule(self) -> Rule:
        given = {name: value for name in RULE_PARAMETERS if (value := getattr(self, name)) is not None}
        return make_rule(self.rule, given, self.rule_parameters)

    @cached_property
    def token_clip(self) -> Clip:
        if self.clip_level == "sequence":
            return Unclipped()
        kind, (low, high) = find_class("clip", self.clip, CLIPS, Clip), self.log_bounds
        if not issubclass(kind, Bounded):
            return make_instance("clip", self.clip, self.clip_parameters, CLIPS, Clip)
        for key in self.clip_parameters:
            raise ConfigError(f"clip_parameters.{key}", f"has no effect with clip {self.clip!r}, whose bounds are eps_*")
        return kind(low=low, high=high)

    @cached_property
    def group_advantage(self) -> Advantage:
        return make_advantage(self.advantage, self.advantage_parameters)

    @cached_property
    def interval(self) -> OrderInterval:
        """The orders that p, and 2p for the ESS, can reach."""
        return OrderInterval.covering(*self.exponent_rule.p_range())


RULE_PARAMETERS = tuple(dict.fromkeys(item.name for kind in RULES.values() for item in fields(kind)))


def _without_parameters(field: str, name: str) -> dict[str, Any]:
    """What a preset says of another rule, clip or advantage than ``name``, taken back."""
    if field == "rule":
        find_rule(name)  # which says more than the first of its parameters that is not known
        return {**dict.fromkeys(RULE_PARAMETERS), "rule_parameters": {}}
    if field == "clip" and not issubclass(find_class("clip", name, CLIPS, Clip), Bounded):
        return {**dict.fromkeys(BOUNDS), "clip_parameters": {}}
    return {f"{field}_parameters": {}}


def _check_rule(config: ObjectiveConfig) -> None:
    if config.exponent_rule.known_p(0.0) is None and config.clip_level == "sequence":
        raise ConfigError(
            "rule", f"{config.rule!r} chooses p by the clipped tokens of a trajectory, but clip_level 'sequence' clips no token"
        )
    for name in config.exponent_rule.group_statistics:
        if name not in STATISTICS:
            raise ConfigError("rule", f"{config.rule!r} asks for the statistic {name!r}; there are {', '.join(STATISTICS)}")
    low, high = config.exponent_rule.p_range()
    if not -P_LIMIT <= low <= high <= P_LIMIT:
        raise ConfigError("rule", f"{config.rule!r} chooses p in [{low}, {high}], which must lie in +-{P_LIMIT:g}")


def _check_bounds(config: ObjectiveConfig) -> None:
    given = [name for name in BOUNDS if getattr(config, name) is not None]
    if config.clip_level == "sequence":
        if config.clip != "one_sided":
            raise ConfigError("clip", f"{config.clip!r} has no effect with clip_level 'sequence', which clips no token")
        kind: type[Clip] = Bounded
    else:
        kind = find_class("clip", config.clip, CLIPS, Clip)
    if not issubclass(kind, Bounded):
        if given:
            raise ConfigError(given[0], f"has no effect with clip {config.clip!r}; clip_parameters are its own")
        return
    pairs = [["eps_low_log", "eps_high_log"], ["eps_low_ratio", "eps_high_ratio"]]
    if given not in pairs and not (issubclass(kind, Weight) and given in (["eps_high_log"], ["eps_high_ratio"])):
        raise ConfigError(
            given[-1] if given else "eps_low_log",
            f"give eps_low_log and eps_high_log, or eps_low_ratio and eps_high_ratio, not {given}",
        )
    if config.eps_low_ratio is not None and config.eps_low_ratio >= 1:
        raise ConfigError(
            "eps_low_ratio",
            f"{config.eps_low_ratio} would allow any ratio above 0; below 1 is right, or use eps_low_log",
        )
    if config.eps_high_ratio is not None and config.eps_high_ratio > math.expm1(LOG_RATIO_LIMIT):
        raise ConfigError("eps_high_ratio", f"{config.eps_high_ratio} is above e^{LOG_RATIO_LIMIT:.0f}, where ratios end")


def _check_corrections(config: ObjectiveConfig) -> None:
    if config.kl_estimator != "k3" and not config.kl_coefficient:
        raise ConfigError("kl_estimator", f"{config.kl_estimator!r} has no effect without kl_coefficient above 0")
    if config.importance_cap != 2.0 and config.importance == "none":
        raise ConfigError("importance_cap", f"{config.importance_cap:g} has no effect with importance 'none'")


def _ratio(low: float | None, high: float, **others: Any) -> ObjectiveConfig:
    """A preset whose bounds are distances from ratio 1."""
    return ObjectiveConfig(eps_low_log=None, eps_high_log=None, eps_low_ratio=low, eps_high_ratio=high, **others)


PRESETS: dict[str, ObjectiveConfig] = {
    "pmpo": ObjectiveConfig(),
    "gmpo": ObjectiveConfig(rule="fixed", p=0.0),
    "hmpo": ObjectiveConfig(rule="fixed", p=-1.0),
    "grpo": _ratio(0.2, 0.2, rule="fixed", p=1.0),
    "dr_grpo": _ratio(0.2, 0.2, rule="fixed", p=1.0, trajectory_weight="constant", advantage="dr_grpo"),
    "dapo": _ratio(0.2, 0.28, rule="fixed", p=1.0, trajectory_weight="length"),
    "cispo": _ratio(None, 0.28, rule="fixed", p=1.0, clip="weight", trajectory_weight="length"),
    "gspo": _ratio(3e-4, 4e-4, rule="fixed", p=0.0, clip_level="sequence"),
    "holder": _ratio(0.2, 0.2, rule="schedule", p_start=2.0, p_end=-2.0, clip_level="sequence"),
}
