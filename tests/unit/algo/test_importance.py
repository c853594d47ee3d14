"""Importance weights, mismatch statistics and penalties against direct formulas."""

import math

import pytest
import torch

from pmpo_megatron.algo.importance import MISMATCH, importance_weights, mismatch_sums
from pmpo_megatron.algo.penalties import kl_penalty, mean_entropy
from pmpo_megatron.algo.rejection import Rejection

G = torch.Generator().manual_seed(0)
OLD = -torch.rand(50, generator=G, dtype=torch.float64) * 3
ROLLOUT = OLD + 0.5 * torch.randn(50, generator=G, dtype=torch.float64)
TRAJECTORY = torch.randint(-1, 3, (50,), generator=G)


def test_token_level():
    weights = importance_weights(OLD, ROLLOUT, TRAJECTORY, 3, level="token", cap=1.5)
    for t in range(50):
        expected = min(math.exp(OLD[t] - ROLLOUT[t]), 1.5) if TRAJECTORY[t] >= 0 else 1.0
        assert weights[t] == pytest.approx(expected, abs=1e-12)


def test_sequence_level_is_the_exponential_of_the_mean_over_all_shards():
    half = torch.arange(50) < 20
    whole = importance_weights(OLD, ROLLOUT, TRAJECTORY, 3, level="sequence", cap=2.0)
    tables = []
    for part in (half, ~half):
        arguments = (OLD[part], ROLLOUT[part], TRAJECTORY[part], 3)
        importance_weights(*arguments, level="sequence", cap=2.0, sum_over_shards=lambda t: (tables.append(t), t)[1])
    for i in range(3):
        chosen = TRAJECTORY == i
        expected = min(math.exp((OLD[chosen] - ROLLOUT[chosen]).mean()), 2.0)
        assert torch.allclose(whole[chosen], torch.tensor(expected, dtype=torch.float64))
    shard = importance_weights(
        OLD[half],
        ROLLOUT[half],
        TRAJECTORY[half],
        3,
        level="sequence",
        cap=2.0,
        sum_over_shards=lambda t: tables[0] + tables[1],
    )
    assert torch.allclose(shard, whole[half])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rejected_are_those_whose_ratio_is_outside_the_bounds(level):
    kept = Rejection(level, 0.9, 1.2).kept_tokens(OLD, ROLLOUT, TRAJECTORY, 3)
    ratios = []
    for t in range(50):
        chosen = TRAJECTORY == TRAJECTORY[t] if level == "sequence" else torch.arange(50) == t
        ratios.append(math.exp((OLD - ROLLOUT)[chosen].mean()))
    expected = [trajectory < 0 or 0.9 <= ratio <= 1.2 for trajectory, ratio in zip(TRAJECTORY.tolist(), ratios, strict=True)]
    assert kept.tolist() == expected and len(set(expected)) == 2
    assert Rejection("none", 0.9, 1.2).kept_tokens(OLD, ROLLOUT, TRAJECTORY, 3) is None


def test_level_none_is_none():
    assert importance_weights(OLD, ROLLOUT, TRAJECTORY, 3, level="none", cap=2.0) is None


def test_mismatch_sums():
    sums, largest = mismatch_sums(OLD, ROLLOUT, TRAJECTORY, (-0.4, 0.3))
    d = (OLD - ROLLOUT)[TRAJECTORY >= 0]
    found = dict(zip(MISMATCH, sums.tolist(), strict=True))
    assert found["tokens"] == len(d) and largest == d.abs().max()
    assert found["sum_abs"] == pytest.approx(float(d.abs().sum()))
    assert found["sum_k1"] == pytest.approx(float(-d.sum()))
    assert found["sum_k3"] == pytest.approx(float((d.exp() - 1 - d).sum()))
    assert found["outside"] == float(((d < -0.4) | (d > 0.3)).sum())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_has_its_own_denominator(estimator):
    policy = OLD.clone().requires_grad_()
    value = kl_penalty(policy, ROLLOUT, TRAJECTORY, estimator=estimator, step_tokens=200.0)
    total, expected = 0.0, torch.zeros(50, dtype=torch.float64)
    for t in (TRAJECTORY >= 0).nonzero().flatten().tolist():
        d = float(OLD[t] - ROLLOUT[t])
        total += {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator] / 200
        expected[t] = {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d)}[estimator] / 200
    assert value.item() == pytest.approx(total)
    assert torch.allclose(torch.autograd.grad(value, policy)[0], expected)


def test_mean_entropy():
    entropy = torch.rand(50, dtype=torch.float64)
    expected = entropy[TRAJECTORY >= 0].sum() / 70
    assert torch.allclose(mean_entropy(entropy, TRAJECTORY, step_tokens=70.0), expected)
