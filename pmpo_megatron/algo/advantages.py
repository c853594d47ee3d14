"""Rewards of groups -> advantages, and the weights c_i of a step (docs/objective.md, "Settings")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pmpo_megatron.errors import ConfigError

STD_EPSILON = 1e-6  # GRPO, 2402.03300: (R - mean) / (std + 1e-6)


def compute_advantages(rewards: Sequence[Sequence[float]], kind: str) -> list[np.ndarray]:
    """Advantages of every group's trajectories, float64, in the shape of ``rewards``.

    Args:
        rewards: one sequence for each group; groups may differ in size.
        kind: ``grpo`` (R - mean)/(std + 1e-6) with the population's std, ``dr_grpo`` R - mean (2503.20783), or ``rloo``
            R - mean of the others (2402.14740). A group of equal rewards, also of one trajectory, gets exactly 0.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in ("grpo", "dr_grpo", "rloo"):
        raise ConfigError("advantage", f"{kind!r} is not one of 'grpo', 'dr_grpo', 'rloo'")
    return [_of_group(np.asarray(group, dtype=np.float64), kind) for group in rewards]


def _of_group(rewards: np.ndarray, kind: str) -> np.ndarray:
    if rewards.size < 2 or np.all(rewards == rewards[0]):
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if kind == "dr_grpo":
        return centred
    if kind == "rloo":
        return centred * (rewards.size / (rewards.size - 1))
    return centred / (rewards.std() + STD_EPSILON)


def trajectory_weights(lengths: Sequence[int], kind: str, *, max_length: int) -> np.ndarray:
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
        return length_N / max(length_N.sum(), 1.0)
    if kind == "constant":
        return length_N / (count * max_length)
    raise ConfigError("trajectory_weight", f"{kind!r} is not one of 'uniform', 'length', 'constant'")
