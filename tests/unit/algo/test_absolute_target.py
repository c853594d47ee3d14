"""What preset pmpo promises for any ratios: the target is met, no token takes more than its part, and p moves continuously."""

import math

import pytest
import torch

from pmpo_megatron.algo.objective import PRESETS, ObjectiveConfig, evaluate_objective
from pmpo_megatron.algo.power_sums import OrderInterval, PowerSums, tabulate
from pmpo_megatron.algo.rules import Ess
from tests.unit.algo.reference import ess_fraction

LENGTHS = (2, 3, 17, 300, 4096, 131072)


def evaluate(x, sign=-1.0, config=PRESETS["pmpo"]):
    """One trajectory of log-ratios ``x``; every token of it on this rank."""
    zeros, one = torch.zeros_like(x), torch.ones(1, dtype=torch.float64)
    return evaluate_objective(x, zeros, torch.zeros(len(x), dtype=torch.long), sign * one, one, config)


def adversarial(length, seed):
    """Log-ratios [T] of one of many shapes: outliers up to the clamp, none to all of the tokens beyond the bounds."""
    g = torch.Generator().manual_seed(1000 * seed + length)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=g))]

    x = pick(0.0, 1e-4, 0.05, 0.3, 1.0, 5.0) * torch.randn(length, generator=g, dtype=torch.float64)
    beyond = round(length * pick(0.0, 1e-3, 0.01, 0.03, 0.05, 0.5, 1.0))
    x[:beyond] = pick(-1.0, 1.0) * pick(0.41, 2.0, 20.0)
    outliers = min(length, pick(0, 0, 1, 1, 3))
    x[length - outliers :] = pick(-20.0, -6.0, 3.0, 6.0, 9.0, 20.0)
    return x[torch.randperm(length, generator=g)].clamp(-20, 20), pick(-1.0, 1.0)


def largest_weight(target, length):
    """m with m^2 + (1 - m)^2 / (T - 1) = 1 / (T target): one weight of m, the others equal."""
    a, c = length / (length - 1), 1 / (length - 1) - 1 / (length * target)
    b = -2 / (length - 1)
    return (-b + math.sqrt(max(0.0, b * b - 4 * a * c))) / (2 * a)


def test_the_bound_on_the_largest_weight_is_attained():
    for length, target in ((2, 0.95), (300, 0.95), (10000, 0.95), (300, 0.5)):
        m = largest_weight(target, length)
        rest = (1 - m) / (length - 1)
        assert 1 / (m * m + (length - 1) * rest * rest) == pytest.approx(length * target) and m >= 1 / length
    assert largest_weight(0.95, 300) == pytest.approx(0.016557, abs=1e-6)


@pytest.mark.parametrize("config", [ObjectiveConfig(), ObjectiveConfig(p_min=0.2)], ids=["pmpo", "p_min"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_target_is_met_and_bounds_the_largest_weight(length, config):
    rule = config.exponent_rule
    reached = lowered = 0
    for seed in range(40 if length < 10000 else 8):
        x, sign = adversarial(length, seed)
        out = evaluate(x, sign, config)
        clipped = x.clamp(max=0.4) if sign > 0 else x.clamp(min=-0.4)
        fraction = float((clipped != x).double().mean())
        target = 0.998 + 0.002 * min(1.0, fraction / 0.02)
        p, n = float(out.p_N), float(out.ess_N) / length
        assert rule.p_min <= p <= 1
        assert abs(n - ess_fraction(clipped, p)) < 1e-9 and abs(float(out.target_ess_N) / length - target) < 1e-12
        if ess_fraction(clipped, rule.p_min) < target - 1e-12:  # no p of the interval reaches it
            assert p == rule.p_min
            continue
        flat = clipped.var(correction=0) < 1e-12
        reached, lowered = reached + 1, lowered + (p < 1)
        assert n >= target - 1e-9 and n >= rule.ess_target - 1e-9
        assert torch.softmax(p * clipped, 0).max() <= largest_weight(min(target, n), length) + 1e-9
        if not flat and ess_fraction(clipped, 1.0) < target - 1e-9:
            assert abs(n - target) <= 1e-9, "the largest p that meets the target, not any"
        else:
            assert p == 1
    assert reached >= 3 and (lowered >= 1 or length == 2)


def test_an_unclipped_outlier_does_not_take_the_gradient():
    x = torch.full((300,), 0.001, dtype=torch.float64)
    x[::2] = -0.001
    x[7] = 9.0
    for rule, least, most in (("ess_relative", 0.96, 0.97), ("ess", 1 / 300, 0.0166)):
        tokens = x.clone().requires_grad_()
        evaluate(tokens, config=ObjectiveConfig(rule=rule)).surrogate.backward()
        assert least < float(tokens.grad[7] / tokens.grad.sum()) < most


def test_p_is_one_on_policy_and_where_ratios_are_near_each_other():
    for length in LENGTHS:
        for sign in (-1.0, 1.0):
            assert evaluate(torch.zeros(length, dtype=torch.float64), sign).p_N.item() == 1.0
            small = 0.03 * torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
            assert evaluate(small.clamp(-0.39, 0.39), sign).p_N.item() == 1.0


def test_p_does_not_rise_with_the_clip_fraction():
    """The rule itself, at sums that stay the same: from 1 down to p_min at clip_reference, and there to the end."""
    x = 0.4 * torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    orders, fractions = [], torch.linspace(0, 1, 401, dtype=torch.float64)
    for ess_target, reference in ((0.95, 0.05), (0.8, 0.5), (0.8, 1.0)):
        rule = Ess(ess_target=ess_target, clip_reference=reference, p_min=0.05)
        p_N = rule.choose(_sums_of(x, 401), fractions)[0]
        assert (p_N.diff() <= 1e-12).all() and p_N.max() <= 1 and p_N.min() == 0.05
        assert (p_N[fractions >= reference] == 0.05).all() and p_N[0] > 0.3
        orders.append(p_N[0])
    assert orders[1] > orders[0], "a lower target is met by a larger p"


def _sums_of(x, count):
    """The power sums of ``count`` trajectories, each with the log-ratios ``x``: those that the objective hands to a rule."""
    interval = OrderInterval.covering(0.0, 1.0)
    table = tabulate(x, torch.zeros_like(x), torch.ones(len(x), dtype=torch.long), 1, interval=interval)
    return PowerSums.read(table.expand(count, -1), interval, {})


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_p_is_continuous_in_the_ratios(sign):
    """Tokens that cross the clip bound one after the other, from f = 0: each moves p by what 1/T moves the target, not more."""
    length = 4096
    x = 0.15 * torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.clamp(-0.35, 0.35)
    x[0] = 2.0 if sign < 0 else 0.35  # where A < 0, an outlier that lowers p
    last = None
    for crossed in range(40):
        for beyond in (-1e-9, 1e-9):
            moved = x.clone()
            moved[1 : 1 + crossed] = sign * 0.5
            moved[1 + crossed] = sign * (0.4 + beyond)
            out = evaluate(moved, sign)
            now = (float(out.target_ess_N) / length, float(out.p_N))
            if last is not None:
                assert abs(now[0] - last[0]) <= 0.1001 / length  # (1 - 0.998) / (0.02 T)
                assert abs(now[1] - last[1]) <= 40 / length
            last = now
    for p, step in ((float(evaluate(x, sign).p_N), 1e-6), (float(evaluate(x, sign).p_N), 1e-4)):
        assert abs(float(evaluate(x + step * torch.sin(torch.arange(length)), sign).p_N) - p) <= 10 * step
