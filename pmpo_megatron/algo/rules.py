"""The rules for p: one class each, of its parameters, their checks, the orders that p can reach, and the formula.

A rule sees the power sums and the clip fractions of all trajectories, already summed over the ranks that share them. A rule
of your own is such a class in a file of yours: docs/adding_a_rule.md.

Legend: N trajectories.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pmpo_megatron.algo.named import find_class, make_instance
from pmpo_megatron.algo.power_sums import PowerSums
from pmpo_megatron.algo.solve import flat_is_one, solve_ess
from pmpo_megatron.config import Section, build, setting
from pmpo_megatron.errors import ConfigError

P_LIMIT = 10.0  # |2p * log-ratio| <= 400 keeps exp within float64


@dataclass(frozen=True, kw_only=True)
class Rule(Section):
    """How p is chosen. A subclass is a frozen dataclass whose fields, made by `setting`, are the rule's parameters.

    A rule that needs statistics of the trajectory's group names them in ``group_statistics``, and finds them in
    ``sums.statistics``; their names are those of `advantages.group_statistics`.
    """

    group_statistics: ClassVar[tuple[str, ...]] = ()

    def p_range(self) -> tuple[float, float]:
        """(least, largest) p that the rule can choose; within +-P_LIMIT. Power sums exist for this range and its double."""
        raise NotImplementedError

    def known_p(self, progress: float) -> float | None:
        """p of all trajectories where it depends on training's progress alone, in [0, 1]; else None, and `choose` is asked."""
        return None

    def choose(self, sums: PowerSums, clip_fraction_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(p_N, the target of ESS / length [N] or None where there is no target), float64, without gradient.

        All trajectories at once: no loop, and no branch on a tensor's value, which would wait for a GPU.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Ess(Rule):
    """The largest p in [p_min, 1] with ESS / length >= target + (1 - target) min(1, f / clip_reference)."""

    ess_target: float = setting(0.998, "ESS that a trajectory without clipped tokens keeps", unit="of its length", above=0.0)
    clip_reference: float = setting(0.02, "clip fraction from which p is least", above=0.0, maximum=1.0)
    p_min: float = setting(0.0, "least p", minimum=0.0, maximum=1.0)

    def validate(self) -> None:
        if self.ess_target >= 1:
            raise ConfigError("ess_target", f"{self.ess_target!r} must be below 1, where every trajectory would have p_min")

    def p_range(self) -> tuple[float, float]:
        return self.p_min, 1.0

    def choose(self, sums: PowerSums, clip_fraction_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        trust_N = 1 - (clip_fraction_N / self.clip_reference).clamp(max=1)
        target_N = 1 - (1 - self.ess_target) * trust_N
        return flat_is_one(solve_ess(sums, target_N, p_min=self.p_min, p_max=1.0), sums), target_N


@dataclass(frozen=True, kw_only=True)
class EssRelative(Rule):
    """n(p) = n(1) + (1 - n(1)) f, p in [0, 1]: no clipped token gives p = 1, however much one token outweighs the others."""

    def p_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def choose(self, sums: PowerSums, clip_fraction_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        at_one_N = torch.exp(sums.at(torch.ones_like(clip_fraction_N))[2])
        target_N = at_one_N + (1 - at_one_N) * clip_fraction_N
        p_N = solve_ess(sums, target_N, p_min=0.0, p_max=1.0)
        p_N = torch.where(clip_fraction_N == 0, 1.0, torch.where(clip_fraction_N == 1, 0.0, p_N))
        return flat_is_one(p_N, sums), target_N


@dataclass(frozen=True, kw_only=True)
class Linear(Rule):
    """p = p_max - (p_max - p_min) min(1, f / clip_reference), the heuristic that the paper ablates."""

    clip_reference: float = setting(1.0, "clip fraction from which p is least", above=0.0, maximum=1.0)
    p_min: float = setting(0.0, "least p", minimum=-P_LIMIT, maximum=P_LIMIT)
    p_max: float = setting(1.0, "largest p", minimum=-P_LIMIT, maximum=P_LIMIT)

    def validate(self) -> None:
        if self.p_min > self.p_max:
            raise ConfigError("p_min", f"{self.p_min} is above p_max = {self.p_max}")

    def p_range(self) -> tuple[float, float]:
        return self.p_min, self.p_max

    def choose(self, sums: PowerSums, clip_fraction_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.p_max - (self.p_max - self.p_min) * (clip_fraction_N / self.clip_reference).clamp(max=1), None


@dataclass(frozen=True, kw_only=True)
class Fixed(Rule):
    """The same p for every trajectory."""

    p: float = setting(help="the order", minimum=-P_LIMIT, maximum=P_LIMIT)

    def p_range(self) -> tuple[float, float]:
        return self.p, self.p

    def known_p(self, progress: float) -> float:
        return self.p


@dataclass(frozen=True, kw_only=True)
class Schedule(Rule):
    """From p_start to p_end, linear in training's progress (HoelderPO, 2605.12058)."""

    p_start: float = setting(help="p at the beginning", minimum=-P_LIMIT, maximum=P_LIMIT)
    p_end: float = setting(help="p at the end", minimum=-P_LIMIT, maximum=P_LIMIT)

    def p_range(self) -> tuple[float, float]:
        return min(self.p_start, self.p_end), max(self.p_start, self.p_end)

    def known_p(self, progress: float) -> float:
        return self.p_start + (self.p_end - self.p_start) * progress


RULES: dict[str, type[Rule]] = {
    "ess": Ess,
    "ess_relative": EssRelative,
    "linear": Linear,
    "fixed": Fixed,
    "schedule": Schedule,
}


def find_rule(name: str) -> type[Rule]:
    """A rule of `RULES`, or the class that ``package.module:Name`` imports.

    Raises:
        ConfigError: there is no such rule.
    """
    if name == "ess_floor":
        raise ConfigError("rule", "'ess_floor' is now 'ess' with ess_target, its ess_floor of before, and clip_reference 1")
    return find_class("rule", name, RULES, Rule)


def make_rule(name: str, parameters: Mapping[str, float], rule_parameters: Mapping[str, Any]) -> Rule:
    """The rule called ``name``: one of `RULES` with ``parameters``, one of the user's own with ``rule_parameters``.

    Raises:
        ConfigError: there is no such rule, or a parameter is missing, out of range, or none of this rule's.
    """
    kind = find_rule(name)
    own = name not in RULES
    for key in () if own else rule_parameters:
        raise ConfigError(f"rule_parameters.{key}", f"is for a rule of your own; a parameter of {name!r} stands beside it")
    for key in parameters:
        if own or key not in {item.name for item in dataclasses.fields(kind)}:
            users = ", ".join(users_of(key))
            raise ConfigError(key, f"has no effect with rule {name!r}; it belongs to {users}")
    return make_instance("rule", name, rule_parameters, RULES, Rule) if own else build(kind, parameters)


def users_of(parameter: str) -> dict[str, dataclasses.Field[Any]]:
    """The rules of `RULES` that have ``parameter``, with the field that each declares."""
    declared = {name: {item.name: item for item in dataclasses.fields(kind)} for name, kind in RULES.items()}
    return {name: fields[parameter] for name, fields in declared.items() if parameter in fields}


def optional_parameter(name: str) -> Any:
    """A setting for a parameter of `RULES`, as its rules declare it; None is the rule's default."""
    users = users_of(name)
    first, *others = users.values()
    default = {rule: "" if item.default is dataclasses.MISSING else f" ({item.default:g})" for rule, item in users.items()}
    rules = ", ".join(rule + default[rule] for rule in users)
    shared = {key: first.metadata[key] for key in ("unit", "minimum", "above", "maximum")}
    shared |= {key: None for key in shared if any(item.metadata[key] != shared[key] for item in others)}
    return setting(None, f"{'rules' if others else 'rule'} {rules}: {first.metadata['help']}", **shared)
