"""A real vLLM engine: its log-probs against transformers in float32, and what happens when it dies in the middle of a batch."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
import transformers

from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.errors import DataError, RolloutError
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.factory import make_engine
from pmpo_megatron.rollout.replay import RecordingEngine, ReplayEngine
from pmpo_megatron.types import Prompt
from tests.integration.engine_worker import engine_for, prompts, save_model
from tests.integration.runs import wait_until


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model("qwen2", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def engine(path):
    made = engine_for(path)
    yield made
    made.close()


def sampling(**changes) -> SamplingConfig:
    return SamplingConfig(**(dict(samples_per_prompt=3, max_tokens=20, temperature=0.7) | changes))


def replaying(path) -> ReplayEngine:
    return ReplayEngine(RolloutConfig(engine="replay", replay_from=str(path)))


def flat(groups) -> list:
    return [
        (group.prompt.index, tuple(rollout.token_ids.tolist()), rollout.log_probs.tolist())
        for group in groups
        for rollout in group.rollouts
    ]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_log_probs_are_those_of_the_distribution_that_was_sampled_from(engine, path, temperature):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for group in engine.generate(prompts(), sampling(temperature=temperature), round_index=0):
        for rollout in group.rollouts:
            ids = torch.tensor(np.concatenate([group.prompt.token_ids, rollout.token_ids])[None])
            with torch.no_grad():
                logits = model(ids).logits[0, len(group.prompt.token_ids) - 1 : -1]
            expected = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(rollout.token_ids).long()[:, None])
            np.testing.assert_allclose(rollout.log_probs, expected[:, 0].numpy(), atol=1e-4)


def test_responses_depend_on_seed_round_and_prompt_not_on_the_batch(engine):
    together = flat(engine.generate(prompts(), sampling(), round_index=3))
    apart = [row for prompt in reversed(prompts()) for row in flat(engine.generate([prompt], sampling(), round_index=3))]
    assert [row[:2] for row in sorted(together)] == [row[:2] for row in sorted(apart)]
    assert len({row[1] for row in together}) == len(together), "every response has a random stream of its own"
    assert flat(engine.generate(prompts(), sampling(), round_index=4)) != together
    assert flat(engine.generate(prompts(), sampling(seed=1), round_index=3)) != together


def test_responses_end_at_the_end_token_or_the_limit(engine, path):
    tokenizer = load_tokenizer(path)
    groups = engine.generate(prompts(), sampling(samples_per_prompt=30, temperature=1.5), round_index=0)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert len(rollout.token_ids) == len(rollout.log_probs)
        if rollout.finish_reason == "stop":
            assert rollout.token_ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in rollout.token_ids[:-1]
        else:
            assert len(rollout.token_ids) == 20


def test_more_prompt_tokens_than_a_batch_holds(engine):
    """vLLM would compute the last prompt of a full batch in two pieces, for which a seeded request has no generator on CPU."""
    many = [
        Prompt(index, np.tile(np.arange(2, 80, dtype=np.int32), 3), "", ("1",)) for index in range(30)
    ]  # 7,020 tokens; a batch takes 4,096
    groups = engine.generate(many, sampling(samples_per_prompt=1, max_tokens=3), round_index=0)
    alone = engine.generate(many[17:18], sampling(samples_per_prompt=1, max_tokens=3), round_index=0)
    assert len(groups) == 30 and flat(groups[17:18])[0][1] == flat(alone)[0][1]


def test_a_text_that_ends_responses_is_kept_in_them(engine):
    groups = engine.generate(prompts(), sampling(samples_per_prompt=20, stop=("7",)), round_index=0)
    stopped = [r for g in groups for r in g.rollouts if "7" in r.text]
    assert stopped and all(r.text.endswith("7") and r.text.count("7") == 1 and r.finish_reason == "stop" for r in stopped)


def test_an_engine_killed_in_the_middle_of_a_batch_is_replaced_and_nothing_is_lost_or_doubled(path):
    engine = engine_for(path)
    many = sampling(samples_per_prompt=60, max_tokens=120)
    try:
        expected = flat(engine.generate(prompts(), many, round_index=0))
        restarts, first = [], engine.process_ids[0]

        def kill() -> None:
            time.sleep(0.5)
            os.kill(first, signal.SIGKILL)

        engine.on_restart = restarts.append
        thread = threading.Thread(target=kill)
        thread.start()
        found = flat(engine.generate(prompts(), many, round_index=0))
        thread.join()
        assert restarts == [engine] and engine.process_ids[0] != first, "it was killed while it generated, and replaced"
        assert [row[:2] for row in found] == [row[:2] for row in expected]
    finally:
        engine.close()


class TestSeveralEngines:
    def test_they_share_the_prompts_and_sample_what_one_does(self, engine, path):
        several = engine_for(path, engines=3)
        try:
            for count in (1, 4):  # also fewer prompts than engines
                expected = engine.generate(prompts(count), sampling(), round_index=3)
                found = several.generate(prompts(count), sampling(), round_index=3)
                assert [row[:2] for row in flat(found)] == [row[:2] for row in flat(expected)]
                for one, other in zip(flat(found), flat(expected), strict=True):
                    np.testing.assert_allclose(one[2], other[2], atol=1e-5)
            assert len(set(several.process_ids)) == 3
        finally:
            several.close()

    def test_one_that_dies_is_replaced_and_the_others_stay(self, path):
        engine = engine_for(path, engines=2)
        many = sampling(samples_per_prompt=60, max_tokens=120)
        try:
            expected = flat(engine.generate(prompts(), many, round_index=0))
            restarts, (first, second) = [], engine.process_ids
            engine.on_restart = restarts.append
            killer = threading.Timer(0.5, os.kill, (second, signal.SIGKILL))
            killer.start()
            found = flat(engine.generate(prompts(), many, round_index=0))
            killer.join()
            wait_until(lambda: restarts, timeout=250, what="the restart")  # the other answers without waiting for it
            assert restarts == [engine] and engine.process_ids[0] == first and engine.process_ids[1] != second
            assert [row[:2] for row in found] == [row[:2] for row in expected]
        finally:
            engine.close()


def test_an_engine_that_keeps_dying_ends_the_run_with_its_log(path):
    engine = engine_for(path, max_restarts=1)
    try:
        real = engine._start

        def start_and_kill(processes) -> None:
            real(processes)
            os.kill(engine.process_ids[0], signal.SIGKILL)

        engine._start = start_and_kill
        os.kill(engine.process_ids[0], signal.SIGKILL)
        with pytest.raises(RolloutError, match="was killed by SIGKILL; it was restarted 1 times"):
            engine.generate(prompts(), sampling(), round_index=0)
    finally:
        engine.close()


def test_an_engine_that_cannot_start_says_why(path, tmp_path):
    config = RolloutConfig(max_model_len=10**6, threads=1, kv_cache_gib=0.1)
    with pytest.raises(RolloutError, match="(?s)did not start.*max_model_len"):
        make_engine(config, model_path=path, device="cpu", worker_extension=None)


class TestReplay:
    def test_recorded_rollouts_come_back_bit_by_bit(self, engine, tmp_path):
        recording = RecordingEngine(engine, tmp_path / "rollouts.jsonl")
        made = [recording.generate(prompts(), sampling(), round_index=r) for r in (0, 1, 1)]
        replay = replaying(tmp_path / "rollouts.jsonl")
        for groups, r in zip(made, (0, 1), strict=False):
            found = replay.generate(prompts(), sampling(), round_index=r)
            assert flat(found) == flat(groups)
            assert [x.text for g in found for x in g.rollouts] == [x.text for g in groups for x in g.rollouts]

    def test_a_round_recorded_again_after_a_resume_replaces_the_first(self, engine, tmp_path):
        for seed in (1, 2):  # two lives of a run
            recording = RecordingEngine(engine, tmp_path / "rollouts.jsonl")
            last = recording.generate(prompts(), sampling(seed=seed), round_index=0)
        found = replaying(tmp_path / "rollouts.jsonl").generate(prompts(), sampling(), round_index=0)
        assert flat(found) == flat(last)

    def test_what_was_not_recorded_is_named(self, engine, tmp_path):
        RecordingEngine(engine, tmp_path / "r.jsonl").generate(prompts(2), sampling(), round_index=0)
        replay = replaying(tmp_path / "r.jsonl")
        with pytest.raises(RolloutError, match="no responses to prompt 2 in round 0"):
            replay.generate(prompts(3), sampling(), round_index=0)
        with pytest.raises(RolloutError, match="3 responses to prompt 0 in round 0, but"):
            replay.generate(prompts(1), sampling(samples_per_prompt=4), round_index=0)
        with (tmp_path / "r.jsonl").open("a") as file:
            file.write('{"format": 1, "round"')
        with pytest.raises(DataError, match=r"r\.jsonl:2: damaged or cut short"):
            replaying(tmp_path / "r.jsonl")
