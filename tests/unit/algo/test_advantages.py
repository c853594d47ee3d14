"""Advantages and trajectory weights against the papers' formulas."""

import statistics

import numpy as np
import pytest

from pmpo_megatron.algo.advantages import compute_advantages, trajectory_weights
from pmpo_megatron.errors import ConfigError

GROUPS = [[1.0, 0.0, 0.0, 1.0], [0.2, 0.9, 0.4], [1.0, 1.0], [0.3], []]


def test_formulas():
    for group, grpo, dr, rloo in zip(
        GROUPS, *(compute_advantages(GROUPS, k) for k in ("grpo", "dr_grpo", "rloo")), strict=True
    ):
        assert len(grpo) == len(group)
        if len(set(group)) < 2:
            assert not np.any(grpo) and not np.any(dr) and not np.any(rloo)
            continue
        mean, std = statistics.mean(group), statistics.pstdev(group)
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            assert grpo[i] == pytest.approx((reward - mean) / (std + 1e-6), abs=1e-12)
            assert dr[i] == pytest.approx(reward - mean, abs=1e-12)
            assert rloo[i] == pytest.approx(reward - statistics.mean(others), abs=1e-12)


def test_equal_rewards_that_do_not_add_up_exactly_have_advantage_zero():
    assert not np.any(compute_advantages([[0.1] * 7], "grpo")[0])


def test_weights():
    lengths = [3, 0, 5, 12]
    assert trajectory_weights(lengths, "uniform", max_length=20).tolist() == [0.25] * 4
    assert np.allclose(trajectory_weights(lengths, "length", max_length=20), np.array(lengths) / 20)
    assert np.allclose(trajectory_weights(lengths, "constant", max_length=50), np.array(lengths) / 200)
    assert trajectory_weights([], "length", max_length=5).size == 0


def test_unknown_kinds_are_refused():
    with pytest.raises(ConfigError):
        compute_advantages(GROUPS, "gae")
    with pytest.raises(ConfigError):
        trajectory_weights([1], "mean", max_length=1)
