"""The family around PMPO: clips whose tokens keep their gradient or lose it, plain sums and table, the group's statistics."""

import pytest
import torch

from pmpo_megatron.algo.advantages import compute_advantages, group_statistics
from pmpo_megatron.algo.objective import PRESETS, ObjectiveConfig, evaluate_objective
from pmpo_megatron.config import build
from pmpo_megatron.errors import ConfigError, NonFiniteError
from tests.unit.algo.own import Shapeless
from tests.unit.algo.test_objective import gradient, make_batch


def test_cispo_is_the_papers_gradient():
    """sum_t sg(clip(ratio)) A log pi (2506.13585): every token keeps its gradient, and only large ratios are bounded."""
    log_probs, old, trajectory, advantages, weights = make_batch(5, std=0.6)
    out = evaluate_objective(log_probs, old, trajectory, advantages, weights, PRESETS["cispo"])
    lengths = torch.stack([(trajectory == i).sum() for i in range(len(advantages))]).clamp(min=1)
    response = trajectory >= 0
    of_token = (advantages * weights / lengths)[trajectory]
    coefficient = torch.exp(log_probs - old).clamp(max=1.28).detach()
    expected = gradient(-(response * coefficient * of_token * log_probs).sum(), log_probs)
    found = gradient(out.surrogate, log_probs)
    assert (found - expected).abs().max() < 1e-12
    clipped = response & (torch.exp(log_probs - old) > 1.28)
    assert clipped.any() and (found[clipped] != 0).all()
    assert out.clip_fraction_N[2] == pytest.approx(float(clipped[trajectory == 2].double().mean()))
    assert abs(out.loss + (response * coefficient * of_token).sum()) < 1e-12


def test_the_mask_of_dppo_is_the_papers_gradient():
    """mask * ratio * A (2602.04879): held back are tokens whose probability moved too far, the way that A rewards."""
    log_probs, old, trajectory, advantages, weights = make_batch(5, std=0.6)
    config = build(ObjectiveConfig, {"preset": "grpo", "clip": "divergence", "clip_parameters": {"low": 0.05, "high": 0.1}})
    out = evaluate_objective(log_probs, old, trajectory, advantages, weights, config)
    lengths = torch.stack([(trajectory == i).sum() for i in range(len(advantages))]).clamp(min=1)
    response, A = trajectory >= 0, advantages[trajectory]
    moved = log_probs.detach().exp() - old.exp()
    masked = torch.where(A > 0, moved > 0.1, moved < -0.05)
    value = torch.exp(log_probs - old) * (weights * advantages / lengths)[trajectory]
    expected = gradient(-(value * (response & ~masked)).sum(), log_probs)
    assert (gradient(out.surrogate, log_probs) - expected).abs().max() < 1e-12
    assert (masked & response & (A > 0)).any() and (masked & response & (A < 0)).any()


@pytest.mark.parametrize("p", [1.0, 0.0, -1.0, 0.5, 0.03, -0.03, 2.0, 1e-7])
@pytest.mark.parametrize("std, outlier", [(1e-3, None), (0.5, None), (0.2, 12.0), (0.2, -20.0)])
def test_plain_sums_equal_the_table(p, std, outlier):
    """At an order that is known beforehand nothing is tabulated; a rule that hides what it knows must get the same."""
    batch = make_batch(3, lengths=(7, 1, 400, 0, 3000), std=std, outlier=outlier)
    plain = evaluate_objective(*batch, ObjectiveConfig(rule="fixed", p=p))
    table = evaluate_objective(*batch, ObjectiveConfig(rule="tests.unit.algo.own:Tabulated", rule_parameters={"p": p}))
    for name in ("loss", "p_N", "power_mean_N", "clip_fraction_N"):
        ours, other = getattr(plain, name), getattr(table, name)
        assert torch.allclose(ours, other, rtol=1e-12, atol=1e-12), name
    assert torch.allclose(plain.ess_N / plain.length_N.clamp(min=1), table.ess_N / table.length_N.clamp(min=1), atol=1e-12)
    ours, other = gradient(plain.surrogate, batch[0]), gradient(table.surrogate, batch[0])
    assert torch.allclose(ours, other, rtol=1e-12, atol=1e-12 * float(ours.abs().max()))


@pytest.mark.parametrize("rule", ["fixed", "ess"])
@pytest.mark.parametrize("index", [-2, -100, 5, 10**6])
def test_an_index_of_no_trajectory_is_named(rule, index):
    log_probs, old, trajectory, advantages, weights = make_batch()
    trajectory[3] = index
    config = ObjectiveConfig(rule=rule, p=1.0) if rule == "fixed" else ObjectiveConfig()
    with pytest.raises(ConfigError, match=rf"trajectory_T: holds {index}; right is 0 to 4, the trajectory, or -1"):
        evaluate_objective(log_probs, old, trajectory, advantages, weights, config)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_an_index_of_another_type_is_named(dtype):
    log_probs, old, trajectory, advantages, weights = make_batch()
    with pytest.raises(ConfigError, match="trajectory_T: is torch.*; int64 is right"):
        evaluate_objective(log_probs, old, trajectory.to(dtype), advantages, weights, PRESETS["pmpo"])


@pytest.mark.parametrize("dtype, weight", [(torch.float64, 1e300), (torch.float32, 1e31)])
def test_an_overflow_of_weight_times_advantage_is_named(dtype, weight):
    log_probs, old, trajectory, advantages, weights = make_batch(dtype=dtype)
    advantages[2], weights[2] = weight, weight / 1e10
    out = evaluate_objective(log_probs, old, trajectory, advantages, weights, PRESETS["grpo"])
    assert out.non_finite_N.tolist() == [False, False, True, False, False]
    assert out.loss.isfinite() and gradient(out.surrogate, log_probs).isfinite().all()
    with pytest.raises(NonFiniteError, match=r"an overflow of weight x advantage, of trajectory \[2\]"):
        out.raise_if_non_finite()


def test_statistics_are_those_of_the_group():
    assert group_statistics([0.0, 1.0, 1.0, 0.0]) == {"reward_mean": 0.5, "reward_std": 0.5}
    assert group_statistics([0.3]) == {"reward_mean": 0.3, "reward_std": 0.0}


def test_an_advantage_of_the_wrong_shape_or_not_finite_is_refused():
    for size in (1, 2):
        with pytest.raises(ConfigError, match="advantage: Shapeless gave .* for the rewards .0.0, 1.0.; a finite number"):
            compute_advantages([[0.0, 1.0]], Shapeless(size=size))
