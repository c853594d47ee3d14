"""The rules, the clip and the advantage of docs/adding_a_rule.md, from a file outside the package, on one and two processes."""

import math
import os
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from pmpo_megatron.algo.advantages import STATISTICS, compute_advantages, group_statistics
from pmpo_megatron.algo.objective import ObjectiveConfig, evaluate_objective
from pmpo_megatron.config import build
from pmpo_megatron.errors import ConfigError
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_model
from tests.unit.algo.test_objective import make_batch

PAGE = (Path(__file__).parents[2] / "docs/adding_a_rule.md").read_text()
REWARDS = [[0.0, 1.0, 1.0, 0.4], [0.9, 0.0, 0.1]]
LENGTHS = (40, 3, 0, 61, 200, 1, 17)
RULES = {"Quadratic": {"floor": 0.8}, "Apmpo": {"decay": 0.8}}


def batch_of(objective):
    """Log-probs, old ones, trajectories, advantages, weights and statistics of two groups."""
    log_probs, old, trajectory, _, weights = make_batch(4, LENGTHS, std=0.6, outlier=4.0)
    advantages = torch.tensor([value for group in compute_advantages(REWARDS, objective.group_advantage) for value in group])
    columns = [group_statistics(group) for group in REWARDS for _ in group]
    statistics_N = {name: torch.tensor([column[name] for column in columns], dtype=torch.float64) for name in STATISTICS}
    return log_probs, old, trajectory, advantages, weights, statistics_N


def objective_of(rule):
    [values] = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return build(
        ObjectiveConfig,
        yaml.safe_load(values)["objective"] | {"rule": f"my_rules:{rule}", "rule_parameters": RULES[rule]},
    )


def evaluate_own(directory):
    """{rule: (loss, p, clip fraction, this rank's part of the gradient)}"""
    sys.path.insert(0, directory)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), int(os.environ["WORLD_SIZE"])

    def reduce(table):
        dist.all_reduce(table)
        return table

    results = {}
    for rule in RULES:
        objective = objective_of(rule)
        log_probs, old, trajectory, advantages, weights, statistics_N = batch_of(objective)
        mine = torch.arange(len(trajectory)) % world_size == rank
        part = log_probs[mine].detach().requires_grad_()
        out = evaluate_objective(
            part, old[mine], trajectory[mine], advantages, weights, objective, None, 0.0, reduce, group_statistics=statistics_N
        )
        out.surrogate.backward()
        gradient = torch.zeros(len(trajectory), dtype=torch.float64)
        gradient[mine] = part.grad
        results[rule] = out.loss.item(), out.p_N.tolist(), out.clip_fraction_N.tolist(), gradient
    dist.destroy_process_group()
    return results


def train_with_apmpo(directory, model):
    """{number of a trajectory: p} of an optimizer step on two groups, whose trajectories lie with either replica."""
    from pmpo_megatron.model.optimizer import OptimizerConfig
    from pmpo_megatron.model.policy import ModelConfig, Policy
    from pmpo_megatron.model.step import optimizer_step, score
    from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
    from pmpo_megatron.training.run_config import RunConfig
    from pmpo_megatron.training.shares import share_round
    from pmpo_megatron.types import Sample, TrajectoryTable

    sys.path.insert(0, directory)
    objective = objective_of("Apmpo")
    batch = {"prompts_per_round": 2, "steps_per_round": 1}
    config = build(RunConfig, {"model": {"path": model}, "data": {"source": "arithmetic"}, "batch": batch})
    state = initialize(ParallelConfig(), device="cpu")
    policy = Policy.build(ModelConfig(path=model), OptimizerConfig(), ParallelConfig(), state)
    ids, samples = np.arange(1, 9, dtype=np.int32), []
    for group_id, group in enumerate(REWARDS):
        for value in compute_advantages([group], objective.group_advantage)[0]:
            number = len(samples)
            log_probs = np.full(2 + number, -5, np.float32)
            samples.append(Sample(number, group_id, ids[:3], ids[: 2 + number], log_probs, False, value))
    table = TrajectoryTable.of(samples, [reward for group in REWARDS for reward in group])
    [batches] = share_round(samples, table, config, state, round_index=0)
    result = optimizer_step(policy, score(policy, batches, temperature=1.0), objective=objective, progress=0.0, temperature=1.0)
    shut_down()
    return dict(zip(result.trajectories["sample_id"].tolist(), result.trajectories["p"].tolist(), strict=True))


@pytest.fixture
def directory(tmp_path, monkeypatch):
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_rules.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield str(tmp_path)
    sys.modules.pop("my_rules", None)


def plain_form(rule, objective):
    """(loss, p, clip fractions, gradient): the formulas of the page, one trajectory at a time, differentiated by autograd."""
    log_probs, old, trajectory, advantages, weights, _ = batch_of(objective)
    medians = [value - statistics.median(group) for group in REWARDS for value in group]
    means = [statistics.mean(group) for group in REWARDS for _ in group]
    assert advantages.tolist() == pytest.approx(medians)
    loss, orders, fractions = torch.zeros((), dtype=torch.float64), [], []
    for i, A in enumerate(medians):
        r = (log_probs - old)[trajectory == i]
        x = r.clamp(max=0.4) if A > 0 else r.clamp(-0.4, 1.1) if A < 0 else r.clamp(max=0.4)
        f = float((x != r).double().mean()) if len(r) else 0.0
        variance = float(x.detach().var(correction=0)) if len(r) else 0.0
        target = 0.8 + 0.2 * f
        flat = variance < 1e-12
        p = math.exp(-0.8 * means[i]) if rule == "Apmpo" else 1.0 if flat else min(1.0, math.sqrt((1 / target - 1) / variance))
        if len(r):
            mean = torch.exp(x.mean()) if p == 0 else torch.exp(p * x).mean() ** (1 / p)
            loss = loss - weights[i] * A * mean
        orders.append(p)
        fractions.append(f)
    return loss.item(), orders, fractions, torch.autograd.grad(loss, log_probs)[0]


def test_they_equal_their_plain_form_on_one_and_two_processes(directory):
    [single] = run_ranks(1, "tests.distributed.test_own_objective:evaluate_own", directory)
    ranks = run_ranks(2, "tests.distributed.test_own_objective:evaluate_own", directory)
    for rule in RULES:
        loss, orders, fractions, gradient = plain_form(rule, objective_of(rule))
        assert max(fractions) > 0 and min(orders) < 0.9
        for results in (single, *ranks):
            assert results[rule][0] == pytest.approx(loss, abs=1e-9)
            assert results[rule][1] == pytest.approx(orders, abs=1e-9)
            assert results[rule][2] == pytest.approx(fractions, abs=1e-12)
        for parts in ([single], ranks):
            total = sum(results[rule][3] for results in parts)
            assert (total - gradient).abs().max() < 1e-9


def test_statistics_of_groups_reach_a_rule_in_an_optimizer_step(directory, tmp_path):
    model = save_tiny_model("qwen2", tmp_path / "model")
    means = [statistics.mean(group) for group in REWARDS for _ in group]
    for orders in run_ranks(2, "tests.distributed.test_own_objective:train_with_apmpo", directory, str(model)):
        assert [orders[i] for i in range(len(means))] == pytest.approx([math.exp(-0.8 * mean) for mean in means], abs=1e-12)


def test_missing_statistics_and_bad_parameters_are_named(directory):
    objective = objective_of("Apmpo")
    *batch, statistics_N = batch_of(objective)
    with pytest.raises(ConfigError, match="group_statistics: lacks 'reward_mean', which rule 'my_rules:Apmpo' needs"):
        evaluate_objective(*batch, objective)
    with pytest.raises(ConfigError, match=r"reward_mean: has shape \(2,\); advantages_N has 7 trajectories"):
        evaluate_objective(*batch, objective, group_statistics={"reward_mean": torch.ones(2)})
    for values, field in (
        ({"clip": "my_rules:DualClip", "clip_parameters": {"mots": 1.0}}, "clip_parameters.mots"),
        ({"clip": "my_rules:DualClip", "clip_parameters": {"most": 0.0}}, "clip_parameters.most"),
        ({"advantage": "my_rules:Median", "advantage_parameters": {"scale": "x"}}, "advantage_parameters.scale"),
        ({"advantage": "my_rules:DualClip"}, "advantage"),
        ({"clip": "my_rules:Median"}, "clip"),
    ):
        with pytest.raises(ConfigError) as caught:
            build(ObjectiveConfig, values)
        assert caught.value.field == field
