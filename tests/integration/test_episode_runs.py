"""Whole runs of episodes: killed and continued at the same bits, and in the other modes with nothing lost."""

import json
import os
import signal

import pytest

from tests.integration import runs
from tests.integration.engine_worker import save_model
from tests.integration.test_run import assert_same_run

EPISODES = ["episode.function=tests.integration.plays:unsteady", "rollout.block_size=32", "run.rounds=3"]
EPISODES += ["sampling.max_tokens=64", "batch.max_tokens_per_micro_batch=512", "monitor.rollout_samples=1000"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("qwen2", tmp_path_factory.mktemp("model") / "model")


def check_rounds(directory, rounds):
    rows = [row for row in runs.metrics(directory) if "reward/mean" in row]
    assert [row["step"] for row in rows] == list(range(1, rounds + 1))
    for row in rows:
        assert row["episode/turns_mean"] > 1 and row["episode/told_tokens_mean"] > 2 and row["episode/failures"] == 0
        assert row["policy/skipped_steps"] == 0 and row["rollout/length_mean"] < 64
    return rows


@pytest.mark.slow  # test_modes.py kills ordinary runs, test_episodes.py repeats a round
def test_killed_a_synchronous_run_of_episodes_ends_at_the_same_bits(model, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.train(model, whole, *EPISODES)
    rows = check_rounds(whole, 3)
    assert all(row["mismatch/max_abs"] < 1e-3 for row in rows)
    assert [row["step"] for row in runs.metrics(whole) if "eval/accuracy_mean" in row] == [0, 2, 3]
    told = [row for row in runs.token_examples(whole, step=1).values() if 0 in row["weight"]]
    assert told and all(len(row["weight"]) == len(row["tokens"]) for row in told)
    process = runs.start(model, killed, *EPISODES)
    runs.wait_until(lambda: runs.last_round(killed) >= 1, timeout=300, what="the first checkpoint")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    runs.train(model, killed, *EPISODES)
    assert_same_run(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["overlapped", "in_flight"])
def test_the_other_modes_train_on_episodes(model, tmp_path, mode):
    directory = tmp_path / "run"
    runs.train(model, directory, *EPISODES, "run.rounds=5", f"round.mode={mode}", "objective.importance=token")
    rows = check_rounds(directory, 5)
    assert any(row["rollout/staleness"] > 0 for row in rows)
    saved = [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
    assert len(saved) == 5 * 6 * 4 and all(row["turns"] > 0 and "failure" not in row for row in saved)


@pytest.mark.slow
def test_replicas_train_on_episodes_as_one_process_does(model, tmp_path):
    """Two processes, each with half of the trajectories, on what one has recorded."""
    record = tmp_path / "rollouts.jsonl"
    runs.train(model, tmp_path / "one", *EPISODES, "evaluation.data=null", f"rollout.record_to={record}")
    replay = ["evaluation.data=null", "rollout.engine=replay", f"rollout.replay_from={record}"]
    runs.train(model, tmp_path / "two", *EPISODES, *replay, processes=2)
    for one, two in zip(check_rounds(tmp_path / "one", 3), check_rounds(tmp_path / "two", 3), strict=True):
        for name in ("objective/p_mean", "objective/loss", "policy/grad_norm", "policy/entropy", "reward/mean"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
