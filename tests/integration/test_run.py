"""Whole runs as users start them: real vLLM, recorded and replayed; killed, stopped and continued."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from tests.integration import runs
from tests.integration.engine_worker import save_model

KILLS = 10
ROUNDS = 12
LONGER = [f"run.rounds={ROUNDS}", "evaluation.every_rounds=5", "evaluation.temperature=1.0", "evaluation.greedy=true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("qwen2", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    """A finished run of one process with vLLM, whose rollouts were recorded."""
    directory = tmp_path_factory.mktemp("runs") / "recorded"
    record = directory.with_name("rollouts.jsonl")
    text = runs.train(model, directory, *LONGER, f"rollout.record_to={record}")
    return directory, record, text


@pytest.fixture(scope="module")
def replayed(model, recorded, tmp_path_factory):
    """The same from the recorded rollouts, uninterrupted."""
    directory = tmp_path_factory.mktemp("runs") / "replayed"
    runs.train(model, directory, *replay(recorded))
    return directory


def replay(recorded) -> list[str]:
    return [*LONGER, "rollout.engine=replay", f"rollout.replay_from={recorded[1]}"]


def assert_same_run(one, other):
    expected, found = runs.checkpoint_tensors(one), runs.checkpoint_tensors(other)
    assert expected.keys() == found.keys() and len(found) > 20
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:4]}"
    assert runs.metrics(one) == runs.metrics(other)


class TestOneProcess:
    def test_a_run_does_what_it_says(self, recorded):
        directory, _, text = recorded
        rounds = [row for row in runs.metrics(directory) if "reward/mean" in row]
        assert [row["step"] for row in rounds] == list(range(1, ROUNDS + 1))
        evaluations = [row for row in runs.metrics(directory) if "eval/accuracy_mean" in row]
        assert [row["step"] for row in evaluations] == [0, 5, 10, 12]
        assert any(row["eval/greedy_accuracy_mean"] != row["eval/accuracy_mean"] for row in evaluations)
        assert all(row["mismatch/mean_abs"] < 1e-4 and row["mismatch/max_abs"] < 1e-3 for row in rounds)
        assert all(row["policy/skipped_steps"] == 0 and row["rollout/staleness"] == 0 for row in rounds)
        assert any(0 < row["objective/p_mean"] < 1 for row in rounds), "some trajectories are clipped"
        assert (directory / "report.html").stat().st_size > 10_000 and "report.html" in text
        assert len(list((directory / "checkpoints").glob("round-*"))) == 2

    def test_the_policy_learns_what_is_rewarded(self, recorded):
        rewards = [row["reward/mean"] for row in runs.metrics(recorded[0]) if "reward/mean" in row]
        assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards

    def test_replayed_rollouts_give_the_same_run_bit_by_bit(self, recorded, replayed):
        assert_same_run(recorded[0], replayed)

    @pytest.mark.timeout(1200)
    def test_killed_again_and_again_it_ends_at_the_same_bits(self, model, recorded, replayed, tmp_path):
        """SIGKILL to the whole run at random moments - while it loads, trains, or writes - and the same command again.

        Unlike the run that it is compared with, it moves its weights and states out while rollouts run.
        """
        directory, settings = tmp_path / "killed", [*replay(recorded), "model.offload=all"]
        dice, where = random.Random(), []
        for attempt in range(1, KILLS + 1):
            process = runs.start(model, directory, *settings)
            runs.wait_until(
                lambda n=attempt: runs.output(directory).count("processes on cpu") == n, timeout=200, what="the start"
            )
            time.sleep(dice.uniform(0.5, 4.0))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            where.append(runs.last_round(directory))
        print(f"killed after rounds {where}")
        runs.train(model, directory, *settings)
        assert_same_run(replayed, directory)

    def test_a_run_that_is_given_again_when_it_is_done_changes_nothing(self, model, recorded, replayed):
        before = runs.metrics(replayed)
        runs.train(model, replayed, *replay(recorded))
        assert runs.metrics(replayed) == before


class TestStop:
    def test_sigterm_saves_and_the_run_goes_on(self, model, tmp_path):
        directory = tmp_path / "stopped"
        process = runs.start(model, directory, "run.rounds=50", "checkpoint.every_rounds=50")
        runs.wait_until(lambda: "round 2/50" in runs.output(directory), timeout=200, what="round 2")
        process.send_signal(signal.SIGTERM)
        text = runs.finish(process, directory)
        assert "stopped and saved" in text
        done = max(row["step"] for row in runs.metrics(directory))
        text = runs.train(model, directory, f"run.rounds={done + 1}")
        assert f"going on after round {done} of {done + 1}" in text
        assert [row["step"] for row in runs.metrics(directory) if "reward/mean" in row] == list(range(1, done + 2))


class TestGuards:
    def test_steps_that_are_not_finite_are_written_to_disk_and_stop_the_run(self, model, recorded, tmp_path):
        directory = tmp_path / "diverged"
        settings = ["optimizer.learning_rate=1e30", "optimizer.clip_grad=0", "guards.max_skipped_steps=2"]
        text = runs.train(model, directory, *replay(recorded), *settings, code=1)
        assert "NonFiniteError: 2 optimizer steps in a row were not finite" in text
        dumps = sorted((directory / "skipped").glob("*.pt"))
        assert len(dumps) == 2
        dump = torch.load(dumps[0], weights_only=True)
        assert (
            dump["problem"]
            and dump["micro_batches"][0]["tokens_1T"].numel() == dump["micro_batches"][0]["old_log_probs_T"].numel() > 0
        )

    def test_engine_and_trainer_with_different_weights_stop_the_run(self, model, recorded, tmp_path):
        """Another model's rollouts stand for an engine that does not hold the trainer's weights."""
        other = save_model("llama", tmp_path / "other")
        text = runs.train(other, tmp_path / "run", *replay(recorded), "guards.mismatch_stop=0.05", code=1)
        assert "MismatchError: round 0: log-probs of trainer and rollout engine differ by" in text


LAYOUTS = {
    "tp2": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "pp2-overlapped": ["parallel.pipeline=2", "round.mode=overlapped", "objective.importance=token"],
    "dp2-dynamic-reference-offload": ["round.dynamic_sampling=true", "objective.kl_coefficient=0.1", "model.offload=all"],
    "cp2": ["parallel.context=2"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes(name, model, recorded, tmp_path):
    """Every layout trains with rollouts from vLLM, and the engine's weights are the trainer's in every round."""
    directory = tmp_path / "run"
    text = runs.train(model, directory, *LAYOUTS[name], "run.rounds=3", processes=2)
    rounds = [row for row in runs.metrics(directory) if "reward/mean" in row]
    assert len(rounds) == 3 and "report.html" in text
    assert [row["step"] for row in runs.metrics(directory) if "eval/accuracy_mean" in row] == [0, 2, 3]
    stale = "overlapped" in name
    assert [row["rollout/staleness"] for row in rounds] == ([0, 1, 1] if stale else [0, 0, 0])
    assert all(row["mismatch/mean_abs"] < 1e-4 for row in rounds if not row["rollout/staleness"])
    if "reference" in name:
        assert rounds[0]["policy/kl_reference"] >= 0 and rounds[-1]["policy/kl_reference"] > 1e-4
    assert "tokens.html" in (directory / "report.html").read_text() and (directory / "tokens.html").exists()
    check_token_examples(runs.token_examples(directory, step=1))
    if name in ("tp2", "cp2"):  # the first round of these is that of one process
        assert_same_tokens(runs.token_examples(directory, step=1), runs.token_examples(recorded[0], step=1))


def check_token_examples(examples):
    """Weights against the formula: exp(p * x) of clipped log-ratios, over its mean; 0 where the clip binds."""
    assert len(examples) > 1
    for example in examples.values():
        ratio, bound = np.array(example["log_ratio"]), 0.4
        x = np.minimum(ratio, bound) if example["advantage"] > 0 else np.maximum(ratio, -bound)
        weight = np.exp(example["p"] * x) / np.exp(example["p"] * x).mean()
        np.testing.assert_allclose(example["weight"], np.where(x == ratio, weight, 0), atol=1e-3)
        assert len(example["tokens"]) == len(ratio) and np.abs(ratio).max() > 1e-3


def assert_same_tokens(one, other):
    assert one.keys() == other.keys()
    for sample_id, example in one.items():
        assert example["tokens"] == other[sample_id]["tokens"] and example["prompt"] == other[sample_id]["prompt"]
        np.testing.assert_allclose(example["log_ratio"], other[sample_id]["log_ratio"], atol=1e-2)
