"""The objective against a slow float64 reference, textbook formulas, and itself on every sharding."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pmpo_megatron.algo.objective import PRESETS, ObjectiveConfig, evaluate_objective
from pmpo_megatron.config import build
from pmpo_megatron.errors import ConfigError, NonFiniteError
from tests.unit.algo.reference import bisect, ess_fraction, reference_objective

EXTRA = {
    "relative": ObjectiveConfig(rule="ess_relative"),
    "target": ObjectiveConfig(ess_target=0.6, clip_reference=1.0, p_min=0.1),
    "linear": ObjectiveConfig(rule="linear", p_min=-1.0, p_max=2.0),
    "steep": ObjectiveConfig(rule="linear", clip_reference=0.2),
    "small": ObjectiveConfig(rule="fixed", p=0.03),
    "divergence": ObjectiveConfig(
        rule="ess", clip="divergence", eps_low_log=None, eps_high_log=None, clip_parameters={"low": 0.05, "high": 0.1}
    ),
    "weight": ObjectiveConfig(clip="weight"),
    "log_sequence": ObjectiveConfig(rule="fixed", p=0.5, clip_level="sequence", eps_low_log=0.1, eps_high_log=0.1),
}
CONFIGS = PRESETS | EXTRA


def make_batch(seed=0, lengths=(7, 1, 120, 0, 33), std=0.3, dtype=torch.float64, outlier=None):
    """Interleaved trajectories with prompt tokens (-1) in between, stale ratios, both signs of advantage and a zero."""
    g = torch.Generator().manual_seed(seed)
    trajectory = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((11,), -1)])
    trajectory = trajectory[torch.randperm(len(trajectory), generator=g)]
    old = -3 * torch.rand(len(trajectory), generator=g, dtype=torch.float64)
    ratio = std * torch.randn(len(trajectory), generator=g, dtype=torch.float64)
    if outlier is not None and len(ratio):
        ratio[:: max(1, len(ratio) // 5)] = outlier
    advantages = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    weights = torch.rand(len(lengths), generator=g, dtype=torch.float64) + 0.1
    return (old + ratio).to(dtype).requires_grad_(), old.to(dtype), trajectory, advantages, weights


def gradient(scalar, log_probs):
    return torch.autograd.grad(scalar, log_probs)[0]


def assert_matches_reference(batch, config, progress=0.3, tolerance=1e-9):
    log_probs, old, trajectory, advantages, weights = batch
    out = evaluate_objective(log_probs, old, trajectory, advantages, weights, config, progress=progress)
    loss, rows = reference_objective(log_probs, old, trajectory, advantages, weights, config, progress)
    assert abs(out.loss - loss.detach()) <= tolerance * max(1, abs(loss.detach()))
    expected = gradient(loss, log_probs) if loss.requires_grad else torch.zeros_like(log_probs)
    scale = max(1.0, float(expected.abs().max()))
    assert (gradient(out.surrogate, log_probs) - expected).abs().max() <= tolerance * scale
    for i, row in enumerate(rows):
        assert out.length_N[i] == row["T"] and abs(out.clip_fraction_N[i] - row["f"]) < 1e-12
        assert abs(out.power_mean_N[i] - row["M"]) <= tolerance * max(1, row["M"])
        n = out.ess_N[i] / max(row["T"], 1)
        assert abs(n - row["n"]) <= 1e-9
        assert abs(out.target_ess_N[i] / max(row["T"], 1) - row["target"]) <= 1e-9
    return out, rows


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("std, outlier", [(0.01, None), (0.3, None), (1.0, None), (0.2, 12.0), (0.2, -20.0), (0.0, None)])
def test_matches_the_slow_reference(name, std, outlier):
    for seed in range(3):
        out, rows = assert_matches_reference(make_batch(seed, std=std, outlier=outlier), CONFIGS[name])
        if std >= 0.2:
            assert all(abs(p - row["p"]) < 1e-8 for p, row in zip(out.p_N.tolist(), rows, strict=True) if row["T"])


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 40), min_size=0, max_size=5),
    std=st.floats(1e-3, 8.0),
    outlier=st.sampled_from([None, 25.0, -25.0, 20.0, 3.0]),
    name=st.sampled_from(sorted(CONFIGS)),
    progress=st.floats(0, 1),
)
@example(seed=0, lengths=[1, 1], std=1.0, outlier=25.0, name="hmpo", progress=0.0)  # all ratios at the clamp
def test_property_matches_the_slow_reference(seed, lengths, std, outlier, name, progress):
    assert_matches_reference(make_batch(seed, lengths, std, outlier=outlier), CONFIGS[name], progress, tolerance=1e-8)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    low=st.floats(0.01, 3.0),
    high=st.floats(0.01, 3.0),
    rule=st.sampled_from(["ess", "ess_relative", "linear"]),
)
def test_property_over_clip_bounds(seed, low, high, rule):
    assert_matches_reference(
        make_batch(seed, std=0.8), ObjectiveConfig(rule=rule, eps_low_log=low, eps_high_log=high), tolerance=1e-8
    )


@pytest.mark.parametrize("p, formula", [(1.0, "grpo"), (0.0, "gmpo"), (-1.0, "hmpo")])
def test_fixed_orders_are_the_textbook_means(p, formula):
    """Arithmetic, geometric and harmonic mean of the clipped ratios, differentiated by autograd as written in the papers."""
    log_probs, old, trajectory, advantages, weights = make_batch(5, std=0.5)
    config = ObjectiveConfig(rule="fixed", p=p)
    loss = 0.0
    for i in range(len(advantages)):
        chosen = trajectory == i
        if chosen.any():
            ratio = torch.exp(log_probs[chosen] - old[chosen])
            A = advantages[i]
            ratio = torch.minimum(ratio * A, ratio.clamp(math.exp(-0.4), math.exp(0.4)) * A) / A
            mean = {"grpo": ratio.mean(), "gmpo": ratio.log().mean().exp(), "hmpo": 1 / (1 / ratio).mean()}[formula]
            loss = loss - weights[i] * A * mean
    out = evaluate_objective(log_probs, old, trajectory, advantages, weights, config)
    assert abs(out.loss - loss) < 1e-10
    assert (gradient(out.surrogate, log_probs) - gradient(loss, log_probs)).abs().max() < 1e-10


@pytest.mark.parametrize("length", [2, 100, 4096, 131072])
@pytest.mark.parametrize("outlier", [None, 8.0, 15.0, 20.0])
def test_ess_meets_its_target_against_bisection(length, outlier):
    """Heavy tails included: outliers at A < 0 are not clipped, and half of the tokens sit near the lower bound."""
    g = torch.Generator().manual_seed(length)
    x = 0.3 * torch.randn(length, generator=g, dtype=torch.float64)
    x[0] = -1.0
    if outlier is not None:
        x[-1] = outlier
    zeros, trajectory = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.long)
    config = ObjectiveConfig(clip_reference=0.5)
    out = evaluate_objective(x, zeros, trajectory, torch.tensor([-1.0]), torch.ones(1), config)
    clipped = x.clamp(min=-0.4)
    target = 0.998 + 0.002 * min(1.0, float((x < -0.4).double().mean()) / 0.5)
    assert abs(out.target_ess_N[0] / length - target) < 1e-12
    assert abs(out.ess_N[0] / length - target) < 1e-9
    assert abs(ess_fraction(clipped, float(out.p_N[0])) - target) < 1e-9
    assert abs(float(out.p_N[0]) - bisect(clipped, target)) < 1e-7


def test_continuous_through_zero_order():
    log_probs, old, trajectory, advantages, weights = make_batch(3, std=0.5)
    centre = None
    for p in (0.0, 1e-12, -1e-12, 1e-9, 1e-7, 1e-6, -1e-6, 2e-6, 1e-5, 1e-4):
        out = evaluate_objective(log_probs, old, trajectory, advantages, weights, ObjectiveConfig(rule="fixed", p=p))
        now = torch.cat([out.power_mean_N, gradient(out.surrogate, log_probs)])
        centre = now if centre is None else centre
        assert (now - centre).abs().max() <= 1e-9 + 2 * abs(p)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_extremes(name, dtype):
    """Ratios beyond the clamp, all clipped, none clipped, one token, very many tokens."""
    for length in (1, 2, 131072):
        for value in (0.0, 1e-3, 20.0, -20.0, 500.0, -500.0):
            for sign in (1.0, -1.0):
                log_probs = torch.full((length,), value, dtype=dtype, requires_grad=True)
                out = evaluate_objective(
                    log_probs,
                    torch.zeros(length, dtype=dtype),
                    torch.zeros(length, dtype=torch.long),
                    torch.tensor([sign]),
                    torch.ones(1),
                    CONFIGS[name],
                    progress=0.7,
                )
                for number in (out.loss, out.p_N, out.ess_N, out.power_mean_N, gradient(out.surrogate, log_probs)):
                    assert number.isfinite().all()
                assert abs(out.ess_N[0] / length - 1) < 1e-9


def test_unclipped_is_one_and_flat_is_one():
    x = torch.tensor([0.01, -0.02, 0.03, 0.0, 0.0, 0.0, 0.7], dtype=torch.float64)
    trajectory = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    out = evaluate_objective(x, torch.zeros(7, dtype=torch.float64), trajectory, torch.ones(3), torch.ones(3), PRESETS["pmpo"])
    assert out.p_N.tolist() == [1.0, 1.0, 1.0] and out.clip_fraction_N.tolist() == [0.0, 0.0, 1.0]


def test_float32_noise_does_not_choose_p():
    noise = 3e-7 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    trajectory = torch.zeros(500, dtype=torch.long)
    out = evaluate_objective(noise, torch.zeros(500), trajectory, torch.ones(1), torch.ones(1), PRESETS["pmpo"])
    assert out.p_N.item() == 1.0


def test_no_trajectories_and_no_tokens_still_join_the_one_collective():
    calls = []

    def count(table):
        calls.append(table.shape)
        return table

    for tokens, trajectories in ((0, 0), (0, 3), (5, 0)):
        log_probs = torch.randn(tokens, requires_grad=True)
        out = evaluate_objective(
            log_probs,
            torch.zeros(tokens),
            torch.full((tokens,), -1),
            torch.ones(trajectories),
            torch.ones(trajectories),
            PRESETS["pmpo"],
            sum_over_shards=count,
        )
        assert out.loss == 0 and out.surrogate == 0 and len(out.p_N) == trajectories
        out.surrogate.backward()
    assert len(calls) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_one_collective_and_any_sharding(name):
    log_probs, old, trajectory, advantages, weights = make_batch(9, lengths=(300, 40, 0, 5), std=0.6, outlier=9.0)
    whole = evaluate_objective(log_probs, old, trajectory, advantages, weights, CONFIGS[name], progress=0.4)
    expected = gradient(whole.surrogate, log_probs)
    owner = torch.randint(0, 3, trajectory.shape, generator=torch.Generator().manual_seed(1))
    tables = []
    for shard in range(4):  # shard 3 owns nothing
        mine = owner == shard
        evaluate_objective(
            log_probs[mine],
            old[mine],
            trajectory[mine],
            advantages,
            weights,
            CONFIGS[name],
            progress=0.4,
            sum_over_shards=lambda t: (tables.append(t), t)[1],
        )
    assert len(tables) == 4
    total = sum(tables)
    for shard in range(4):
        mine = owner == shard
        part = log_probs[mine].detach().requires_grad_()
        out = evaluate_objective(
            part, old[mine], trajectory[mine], advantages, weights, CONFIGS[name], progress=0.4, sum_over_shards=lambda t: total
        )
        assert abs(out.loss - whole.loss) < 1e-12 * max(1, abs(whole.loss)) and torch.allclose(out.p_N, whole.p_N, atol=1e-10)
        assert torch.allclose(gradient(out.surrogate, part), expected[mine], rtol=1e-12, atol=1e-12)


def test_micro_batching_changes_nothing():
    log_probs, old, trajectory, advantages, weights = make_batch(2, lengths=(9, 30, 4, 17), std=0.5)
    whole = evaluate_objective(log_probs, old, trajectory, advantages, weights, PRESETS["pmpo"])
    pieces = [
        evaluate_objective(
            log_probs, old, torch.where(trajectory == i, 0, -1), advantages[i : i + 1], weights[i : i + 1], PRESETS["pmpo"]
        )
        for i in range(4)
    ]
    assert abs(sum(p.loss for p in pieces) - whole.loss) < 1e-12
    total = sum(gradient(p.surrogate, log_probs) for p in pieces)
    assert (total - gradient(whole.surrogate, log_probs)).abs().max() < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["log_probs", "old", "advantage", "weight", "token_weight"])
def test_non_finite_input_is_named_and_does_not_spread(bad, where):
    log_probs, old, trajectory, advantages, weights = (t.detach().clone() for t in make_batch(4, lengths=(5, 9, 3)))
    token_weights = torch.ones_like(old)
    victim = int((trajectory == 1).nonzero()[0])
    {"log_probs": log_probs, "old": old, "token_weight": token_weights}.get(where, old)[victim] += (
        bad if where in ("log_probs", "old", "token_weight") else 0
    )
    if where == "advantage":
        advantages[1] = bad
    if where == "weight":
        weights[1] = bad
    log_probs.requires_grad_()
    out = evaluate_objective(log_probs, old, trajectory, advantages, weights, PRESETS["pmpo"], token_weights_T=token_weights)
    clean = evaluate_objective(
        log_probs,
        old,
        torch.where(trajectory == 1, -1, trajectory),
        advantages.nan_to_num(0, 0, 0),
        weights.nan_to_num(0, 0, 0),
        PRESETS["pmpo"],
    )
    assert torch.equal(out.non_finite_N, torch.tensor([False, True, False]))
    assert abs(out.loss - clean.loss) < 1e-12
    assert (gradient(out.surrogate, log_probs) - gradient(clean.surrogate, log_probs)).abs().max() < 1e-12
    with pytest.raises(NonFiniteError, match="sample-b"):
        out.raise_if_non_finite(["sample-a", "sample-b", "sample-c"])
    clean.raise_if_non_finite()


def test_token_weights_scale_each_tokens_gradient_only():
    log_probs, old, trajectory, advantages, weights = make_batch(6)
    token_weights = torch.rand_like(old)
    plain = evaluate_objective(log_probs, old, trajectory, advantages, weights, PRESETS["pmpo"])
    weighted = evaluate_objective(
        log_probs, old, trajectory, advantages, weights, PRESETS["pmpo"], token_weights_T=token_weights
    )
    assert weighted.loss == plain.loss
    expected = gradient(plain.surrogate, log_probs) * token_weights
    assert (gradient(weighted.surrogate, log_probs) - expected).abs().max() < 1e-14


@pytest.mark.parametrize(
    "values, field, words",
    [
        ({"preset": "pmppo"}, "preset", "did you mean 'pmpo'"),
        ({"rule": "ess", "p": 1.0}, "p", "no effect with rule 'ess'"),
        ({"rule": "fixed"}, "p", "is required (the order)"),
        ({"rule": "schedule", "p_start": 2.0}, "p_end", "required"),
        ({"rule": "linear", "p_min": 1.0, "p_max": 0.0}, "p_min", "above p_max"),
        ({"ess_target": 0.0}, "ess_target", "must be above 0"),
        ({"ess_target": 1.0}, "ess_target", "must be below 1"),
        ({"ess_target": float("nan")}, "ess_target", "is not a number"),
        ({"clip_reference": 0.0}, "clip_reference", "must be above 0"),
        ({"clip_reference": 1.1}, "clip_reference", "must be at most 1"),
        ({"rule": "linear", "clip_reference": 0.0}, "clip_reference", "must be above 0"),
        ({"p_min": -0.1}, "p_min", "must be at least 0"),
        ({"p_min": 1.1}, "p_min", "must be at most 1"),
        ({"rule": "ess_relative", "ess_target": 0.9}, "ess_target", "no effect with rule 'ess_relative'; it belongs to ess"),
        ({"rule": "fixed", "p": 1.0, "clip_reference": 0.5}, "clip_reference", "it belongs to ess, linear"),
        ({"rule": "ess_floor", "ess_floor": 0.6}, "rule", "is now 'ess' with ess_target"),
        ({"preset": "pmpo", "rule": "ess_floor"}, "rule", "is now 'ess' with ess_target"),
        ({"rule": "ess_relativ"}, "rule", "did you mean 'ess_relative'"),
        ({"rule_parameters": {"floor": 1.0}}, "rule_parameters.floor", "for a rule of your own"),
        ({"rule": "no_such_module:Rule"}, "rule", "cannot be imported"),
        ({"rule": "math:gone"}, "rule", "cannot be imported"),
        ({"rule": "math:cos"}, "rule", "is not a subclass of"),
        ({"clip_level": "sequence"}, "rule", "clips no token"),
        ({"clip": "onesided"}, "clip", "did you mean 'one_sided'"),
        ({"clip": "math:cos"}, "clip", "is not a subclass of pmpo_megatron.algo.clips.Clip"),
        ({"clip": "divergence", "eps_low_log": 0.1}, "eps_low_log", "no effect with clip 'divergence'"),
        ({"clip": "divergence", "clip_parameters": {"hig": 1}}, "clip_parameters.hig", "did you mean 'high'"),
        ({"clip_parameters": {"low": 0.1}}, "clip_parameters.low", "no effect with clip 'one_sided'"),
        ({"preset": "gspo", "clip": "weight"}, "clip", "no effect with clip_level 'sequence'"),
        ({"preset": "cispo", "clip": "one_sided"}, "eps_high_ratio", "give eps_low_log and eps_high_log"),
        ({"advantage": "gae"}, "advantage", "known keys: grpo, dr_grpo, rloo, package.module:Name"),
        ({"advantage_parameters": {"scale": 1}}, "advantage_parameters.scale", "unknown key"),
        ({"rule": "tests.unit.algo.own:Demanding"}, "rule", "asks for the statistic 'reward_median'; there are reward_mean"),
        ({"eps_low_ratio": 0.2}, "eps_low_ratio", "eps_low_ratio and eps_high_ratio"),
        ({"eps_low_log": None}, "eps_high_log", "eps_low_log and eps_high_log"),
        ({"eps_low_ratio": 1.2, "eps_high_ratio": 0.2}, "eps_low_ratio", "use eps_low_log"),
        ({"kl_estimator": "k2"}, "kl_estimator", "no effect without kl_coefficient"),
        ({"importance_cap": 5.0}, "importance_cap", "no effect with importance 'none'"),
        ({"preset": "grpo", "eps_low_log": 0.2, "eps_high_log": 0.2, "eps_low_ratio": 0.1}, "eps_high_ratio", "not"),
    ],
)
def test_senseless_combinations_are_refused(values, field, words):
    with pytest.raises(ConfigError) as caught:
        build(ObjectiveConfig, values)
    assert caught.value.field == field and words in str(caught.value)


def test_a_preset_is_a_base_for_other_keys():
    assert build(ObjectiveConfig, {"preset": "dapo"}) == PRESETS["dapo"]
    changed = build(ObjectiveConfig, {"preset": "grpo", "eps_low_log": 0.3, "eps_high_log": 0.5})
    assert changed.log_bounds == (-0.3, 0.5) and changed.p == 1.0
    assert build(ObjectiveConfig, {"preset": "grpo", "rule": "ess"}).p is None
