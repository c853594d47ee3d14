"""Trajectories token by token: the share of the gradient against the formula, and the page that shows it."""

import html
import re

import numpy as np
import pytest

from pmpo_megatron.algo.objective import PRESETS, ObjectiveConfig
from pmpo_megatron.model.step_results import StepResult
from pmpo_megatron.monitor import MonitorConfig, RunLog, write_report
from pmpo_megatron.training.token_examples import MAX_TOKENS, choose, describe_tokens, recorded
from pmpo_megatron.types import Sample, to_token_ids

GROUP = {"reward_mean": 0.25, "reward_std": 0.5}


def sample(length: int, advantage: float, sample_id: int = 3) -> Sample:
    log_probs = np.zeros(length, np.float32)
    return Sample(sample_id, 0, to_token_ids([7, 8]), to_token_ids(range(length)), log_probs, False, advantage)


def described(log_ratio, advantage, objective):
    old = np.full(len(log_ratio), -1.0, dtype=np.float32)
    new = (old + np.asarray(log_ratio)).astype(np.float32)
    return describe_tokens(sample(len(log_ratio), advantage), old, new, objective, progress=0.0, group=GROUP)


@pytest.mark.parametrize("advantage", [0.7, -1.3])
@pytest.mark.parametrize("p", [1.0, 0.3, 0.0, -1.0])
def test_weights_are_the_formulas_and_clipped_tokens_have_none(p, advantage):
    log_ratio = np.random.default_rng(0).normal(0, 0.3, 60)
    found = described(log_ratio, advantage, ObjectiveConfig(rule="fixed", p=p))
    clipped = log_ratio > 0.4 if advantage > 0 else log_ratio < -0.4
    x = np.minimum(log_ratio, 0.4) if advantage > 0 else np.maximum(log_ratio, -0.4)
    weight = np.exp(p * x) / np.exp(p * x).sum() * 60
    assert 0 < clipped.sum() < 20
    np.testing.assert_allclose(found["weight"], np.where(clipped, 0, weight), atol=2e-4)
    np.testing.assert_allclose(found["log_ratio"], log_ratio, atol=1e-4)
    assert found["ess"] == pytest.approx(60 / np.mean(weight**2), rel=1e-5)
    assert found["clip_fraction"] == pytest.approx(clipped.mean()) and found["p"] == p and found["advantage"] == advantage


def test_the_rule_of_the_run_chooses_p():
    found = described([0.0] * 50 + [3.0], -1.0, PRESETS["pmpo"])
    assert 0 < found["p"] < 1 and found["ess"] / 51 == pytest.approx(0.998, abs=1e-6) == found["target_ess"] / 51


def test_trajectories_are_chosen_over_the_whole_range_of_p_and_only_with_a_gradient():
    length = np.array([9.0, 9, 9, 9, 9, MAX_TOKENS + 1, 0])
    arrays = {"sample_id": np.arange(7), "p": np.array([0.9, 0.1, 0.5, 0.0, 0.4, 0.05, 0.2]), "ess": length, "length": length}
    result = StepResult(0.0, 0.0, 0.0, True, None, arrays, 0.0, None, 0)
    advantages = np.array([1.0, 1, -1, 0, 1, 1, 1])
    assert choose(result, advantages, 3) in ([1, 2, 0], [1, 4, 0])
    assert choose(result, advantages, 9) == [1, 4, 2, 0] and choose(result, np.zeros(7), 3) == []


def test_a_long_run_records_few_rounds_and_the_last():
    assert all(recorded(index, 30) for index in range(30))
    chosen = [index for index in range(1000) if recorded(index, 1000)]
    assert 40 <= len(chosen) <= 42 and chosen[0] == 0 and chosen[-1] == 999


def test_the_page_shades_tokens_and_the_report_links_it(tmp_path):
    log = RunLog(MonitorConfig(progress="off", tensorboard=False), tmp_path / "run", run={}, total_steps=40)
    example = described([0.1, -0.2, 2.0, 0.3], 1.0, PRESETS["gmpo"]) | {"prompt": "1+1=", "reward": 1.0}
    for step in range(1, 41):
        log.log(step, {"reward/mean": 0.5}, tokens=[example | {"tokens": ["<b>", "x", "y", "z"]}])
    log.close()
    report = write_report([tmp_path / "run"], tmp_path / "out" / "report.html").read_text()
    assert 'href="../run/tokens.html"' in report
    page = (tmp_path / "run" / "tokens.html").read_text()
    headings = [int(number) for number in re.findall(r"<h2>round (\d+)", page)]
    assert len(headings) == 12 and headings[0] == 1 and headings[-1] == 40
    last = page[page.rindex("<h2>") :]
    assert html.escape("<b>") in last and last.count('class="clipped"') == 1 and "log-ratio +2.000, clipped" in last
    assert "p 0.000" in last and "25.0% clipped" in last and "advantage +1.00" in last
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_a_run_without_examples_has_no_page(tmp_path):
    log = RunLog(MonitorConfig(progress="off", tensorboard=False), tmp_path, run={}, total_steps=1)
    log.log(1, {"reward/mean": 0.5})
    log.close()
    assert "tokens.html" not in write_report([tmp_path], tmp_path / "report.html").read_text()
    assert not (tmp_path / "tokens.html").exists()
