"""Whole runs with real vLLM that are killed: synchronous ones end at the same bits, in flight nothing is lost or repeated."""

import json
import os
import signal
from collections import Counter

import pytest

from pmpo_megatron.data.generated import make_problems
from tests.integration import runs
from tests.integration.engine_worker import save_model
from tests.integration.test_run import assert_same_run

ROUNDS, PROMPTS, SAMPLES, PROBLEMS = 6, 6, 4, 40  # less than an epoch
IN_FLIGHT = [f"run.rounds={ROUNDS}", "round.mode=in_flight", "objective.importance=token", "monitor.rollout_samples=1000"]
IN_FLIGHT += ["sampling.max_tokens=64", "batch.max_tokens_per_micro_batch=512"]  # long enough for several versions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("qwen2", tmp_path_factory.mktemp("model") / "model")


def trained(directory) -> Counter:
    """How many responses to each problem the rounds were trained on."""
    rows = [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
    return Counter(row["prompt"] for row in rows)


def engines(process) -> list[int]:
    """The vLLMs of the run: what is forked from the fork server that has vLLM imported has its command line."""
    found = []
    for child in os.listdir("/proc"):
        if child.isdigit():
            try:
                with open(f"/proc/{child}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
                with open(f"/proc/{child}/cmdline") as file:
                    command = file.read()
            except OSError:
                continue
            if int(fields[2]) == process.pid and "vllm_preload" in command:
                found.append(int(child))
    return sorted(found)[1:]  # the first is the fork server


@pytest.mark.parametrize("engines", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_a_synchronous_run_ends_at_the_same_bits(model, tmp_path, engines):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = ["run.rounds=3", f"rollout.engines={engines}", "evaluation.data=null"]
    runs.train(model, whole, *settings)
    process = runs.start(model, killed, *settings)
    runs.wait_until(lambda: runs.last_round(killed) >= 1, timeout=300, what="the first checkpoint")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    runs.train(model, killed, *settings)
    assert_same_run(whole, killed)


@pytest.mark.parametrize("update", [pytest.param("round", marks=pytest.mark.slow), "step"])
def test_killed_in_flight_a_run_trains_on_every_prompt_once(model, tmp_path, update):
    directory, settings = tmp_path / "run", [*IN_FLIGHT, f"round.update={update}"]
    process = runs.start(model, directory, *settings)
    runs.wait_until(lambda: runs.last_round(directory) >= 1, timeout=300, what="the first checkpoint")
    if update == "step":
        os.kill(engines(process)[-1], signal.SIGKILL)
        runs.wait_until(lambda: runs.last_round(directory) >= 3, timeout=300, what="another round")
        assert "was killed by SIGKILL; starting it again" in runs.output(directory)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    runs.train(model, directory, *settings)
    rounds = [row for row in runs.metrics(directory) if "reward/mean" in row]
    assert [row["step"] for row in rounds] == list(range(1, ROUNDS + 1))
    given = Counter(problem.text for problem in make_problems("arithmetic", PROBLEMS))  # some stand twice
    seen = trained(directory)
    assert sum(seen.values()) == ROUNDS * PROMPTS * SAMPLES
    assert all(count % SAMPLES == 0 and count <= SAMPLES * given[text] for text, count in seen.items())
    assert all(row["rollout/staleness_max"] <= 2 for row in rounds) and rounds[0]["rollout/staleness_max"] == 0
    assert any(row["rollout/staleness"] > 0 for row in rounds)
    assert all(row["mismatch/mean_abs"] < 1e-4 for row in rounds if row["rollout/staleness_max"] == 0)
