"""Mode in_flight: what finishes while others are scored is scored side by side."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np

from pmpo_megatron.data.sampler import PromptSampler
from pmpo_megatron.rewards import RewardConfig, RewardScorer
from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.training.run_config import BatchConfig, RoundConfig
from pmpo_megatron.training.stream import StreamCollector
from pmpo_megatron.types import Prompt, Rollout, RolloutGroup, to_token_ids


def answered(prompt):
    ids, numbers = to_token_ids([5]), (2 * prompt.index, 2 * prompt.index + 1)
    rollouts = (Rollout(ids, np.zeros(1, np.float32), str(n), "stop", np.zeros(1, np.int32), n) for n in numbers)
    return RolloutGroup(prompt, tuple(rollouts))


def test_groups_that_are_finished_are_scored_side_by_side(tmp_path):
    futures = {}

    def submit(prompts, sampling, *, round_index):
        futures[prompts[0].index] = Future()
        return [futures[prompts[0].index]]

    metadata = {"go": str(tmp_path / "go")}
    prompts = [Prompt(index, to_token_ids([1]), "", ("x",), metadata) for index in range(4)]
    name = "tests.integration.rewards:all_at_once"
    collector = StreamCollector(
        rounds=1,
        versions_per_round=1,
        drawn=0,
        open=(),
        prompts=prompts,
        sampler=PromptSampler(4, seed=0),
        engine=SimpleNamespace(version=0, submit=submit),
        scorer=RewardScorer(RewardConfig(functions={name: 1.0}, workers=1, timeout_s=120.0, attempts=1), max_tokens=9),
        sampling=SamplingConfig(samples_per_prompt=2),
        batch=BatchConfig(prompts_per_round=4, steps_per_round=1),
        round=RoundConfig(mode="in_flight", max_staleness=1),
        advantage="grpo",
        examples=0,
    )
    found = []
    thread = threading.Thread(target=lambda: found.append(collector.collect(0, stop=lambda: False)))
    thread.start()
    while len(futures) < 4:
        time.sleep(0.01)
    for index in range(4):  # the first alone, and the others while it is scored
        futures[index].set_result(answered(prompts[index]))
    (tmp_path / "go").touch()
    thread.join(timeout=250)
    collector.close()
    assert sorted(found[0].table.rewards_N) == [float(number) for number in range(8)]
