"""Rewards of groups -> advantages and statistics, and the weights c_i of a step (docs/objective.md, "Settings").

An advantage of your own is a class like those below in a file of yours: docs/adding_a_rule.md.

Legend: G trajectories of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpo_megatron.algo.named import make_instance
from pmpo_megatron.config import Section
from pmpo_megatron.errors import ConfigError

Floats = npt.NDArray[np.float64]
STATISTICS = ("reward_mean", "reward_std")  # of `group_statistics`
STD_EPSILON = 1e-6  # GRPO, 2402.03300: (R - mean) / (std + 1e-6)


@dataclass(frozen=True, kw_only=True)
class Advantage(Section):
    """An advantage within a group. A subclass is a frozen dataclass whose fields, made by `setting`, are its parameters."""

    def of_group(self, rewards_G: Floats) -> Floats:
        """Advantages [G] of trajectories with these rewards, which are at least two and not all equal."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Grpo(Advantage):
    """(R - mean) / (std + 1e-6) with the population's std (2402.03300)."""

    def of_group(self, rewards_G: Floats) -> Floats:
        return _centred(rewards_G) / (float(rewards_G.std()) + STD_EPSILON)


@dataclass(frozen=True, kw_only=True)
class DrGrpo(Advantage):
    """R - mean (2503.20783)."""

    def of_group(self, rewards_G: Floats) -> Floats:
        return _centred(rewards_G)


@dataclass(frozen=True, kw_only=True)
class Rloo(Advantage):
    """R - mean of the others (2402.14740)."""

    def of_group(self, rewards_G: Floats) -> Floats:
        return _centred(rewards_G) * (rewards_G.size / (rewards_G.size - 1))


def _centred(rewards_G: Floats) -> Floats:
    return rewards_G - float(rewards_G.mean())


ADVANTAGES: dict[str, type[Advantage]] = {"grpo": Grpo, "dr_grpo": DrGrpo, "rloo": Rloo}


def make_advantage(name: str, parameters: dict[str, Any]) -> Advantage:
    """One of `ADVANTAGES`, or one of the user's own.

    Raises:
        ConfigError: there is no such advantage, or a parameter of it is unknown, missing or out of range.
    """
    return make_instance("advantage", name, parameters, ADVANTAGES, Advantage)


def compute_advantages(rewards: Sequence[Sequence[float]], kind: str | Advantage) -> list[Floats]:
    """Advantages of every group's trajectories, float64, in the shape of ``rewards``.

    Args:
        rewards: one sequence for each group; groups may differ in size.
        kind: an advantage, or the name of one without parameters. A group of equal rewards, also of one trajectory, gets
            exactly 0 from every advantage: it says nothing about which response is better.

    Raises:
        ConfigError: an unknown kind, or one of the user's own that gave something else than G finite numbers.
    """
    advantage = make_advantage(kind, {}) if isinstance(kind, str) else kind
    return [_of_group(np.asarray(group, dtype=np.float64), advantage) for group in rewards]


def _of_group(rewards_G: Floats, advantage: Advantage) -> Floats:
    if rewards_G.size < 2 or np.all(rewards_G == rewards_G[0]):
        return np.zeros_like(rewards_G)
    values_G = np.asarray(advantage.of_group(rewards_G), dtype=np.float64)
    if values_G.shape != rewards_G.shape or not np.isfinite(values_G).all():
        problem = f"{type(advantage).__name__} gave {values_G.tolist()} for the rewards {rewards_G.tolist()}"
        raise ConfigError("advantage", f"{problem}; a finite number for each is right")
    return values_G


def group_statistics(rewards: Sequence[float] | Floats) -> dict[str, float]:
    """What a rule may know of the group that a trajectory belongs to, by name: the rewards' mean and population's std."""
    rewards_G = np.asarray(rewards, dtype=np.float64)
    return dict(zip(STATISTICS, (float(rewards_G.mean()), float(rewards_G.std())), strict=True))


def trajectory_weights(lengths: Sequence[int], kind: str, *, max_length: int) -> Floats:
    """c_i of the N trajectories of a whole optimizer step: all micro-batches, all data-parallel ranks. float64 [N].

    Args:
        lengths: T_i, response tokens of each trajectory.
        kind: ``uniform`` 1/N, ``length`` T_i / sum T_j (DAPO), ``constant`` T_i / (N * max_length) (Dr. GRPO).
        max_length: L_max, the limit on response tokens.

    Raises:
        ConfigError: an unknown kind.
    """
    length_N = np.asarray(lengths, dtype=np.float64)
    count = max(len(length_N), 1)
    if kind == "uniform":
        return np.full(len(length_N), 1.0 / count)
    if kind == "length":
        return length_N / max(float(length_N.sum()), 1.0)
    if kind == "constant":
        return length_N / (count * max_length)
    raise ConfigError("trajectory_weight", f"{kind!r} is not one of 'uniform', 'length', 'constant'")
