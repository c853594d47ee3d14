"""Real vLLM whose weights change while it generates: versions of tokens, their log-probs, prefixes, and prompts in a queue."""

import os
import signal

import numpy as np
import pytest
import torch
import transformers

from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.types import Prompt
from tests.integration import plays
from tests.integration.engine_worker import engine_for, prompts, save_model
from tests.integration.test_episodes import Playing, long_prompts
from tests.integration.test_rollout import flat, sampling
from tests.weights import Courier

LONG = SamplingConfig(samples_per_prompt=6, max_tokens=180, temperature=1.0)
ATTEMPTS = 5  # an update may come after the last token on a busy machine


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(a checkpoint, by version models of its shape: version 0 is its own)."""
    path = tmp_path_factory.mktemp("models")
    save_model("qwen2", path / "0")
    found = {}
    for version in range(3):
        model = transformers.AutoModelForCausalLM.from_pretrained(path / "0", dtype=torch.float32)
        torch.manual_seed(version)
        for parameter in model.parameters() if version else ():
            parameter.data += 0.3 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter)
        found[version] = model.eval()
    return path / "0", found


def load(courier, model, version):
    with courier.engine.update(version):
        [answer] = courier.send(model.state_dict(), version)
        assert answer["problem"] is None


def expected_log_probs(models, prompt_ids, rollout, weights_of, *, recompute):
    """By Hugging Face; what keys and values of earlier tokens are made of is kept from version to version, or is made anew."""
    ids, start = torch.tensor(np.concatenate([prompt_ids, rollout.token_ids]))[None].long(), len(prompt_ids)
    changes = [0, *(np.flatnonzero(np.diff(rollout.versions)) + 1), len(rollout.token_ids)]
    cache, seen, rows = transformers.DynamicCache(), 0, []
    for first, end in zip(changes, changes[1:], strict=False):
        model = models[weights_of[int(rollout.versions[first])]]
        if recompute:
            cache, seen = transformers.DynamicCache(), 0
        with torch.no_grad():
            logits = model(ids[:, seen : start + end - 1], past_key_values=cache, use_cache=True).logits[0]
        seen = start + end - 1
        rows.append(torch.log_softmax(logits[-(end - first) :], -1))
    return torch.cat(rows).gather(1, ids[0, start:, None])[:, 0].numpy()


@pytest.mark.parametrize("recompute", [False, True])
def test_every_tokens_log_prob_is_that_of_the_version_that_made_it(models, recompute):
    path, found = models
    engine = engine_for(str(path), recompute_kv=recompute)
    try:
        courier = Courier(engine, path)
        for attempt in range(ATTEMPTS):
            weights_of = {3 * attempt + which: which for which in range(3)}
            load(courier, found[0], 3 * attempt) if attempt else None
            futures = engine.submit(prompts(), LONG, round_index=attempt)
            for which in (1, 2):
                marks = engine.submit(prompts(1), sampling(max_tokens=20), round_index=which)
                marks[0].result(timeout=100)  # twenty steps went by
                load(courier, found[which], 3 * attempt + which)
            late = engine.submit(prompts(), sampling(max_tokens=9), round_index=7)
            groups = [future.result(timeout=200) for future in [*futures, *late]]
            made = [(group.prompt.token_ids, rollout) for group in groups for rollout in group.rollouts]
            if any(len(set(rollout.versions)) == 3 for _, rollout in made):
                break
        else:
            pytest.fail("no response was long enough for three versions")
        for prompt_ids, rollout in made:
            expected = expected_log_probs(found, prompt_ids, rollout, weights_of, recompute=recompute)
            temperature = 1.0 if len(rollout.token_ids) > 9 else 0.7
            if temperature == 1.0:
                np.testing.assert_allclose(rollout.log_probs, expected, atol=1e-4)
            assert len(rollout.versions) == len(rollout.token_ids) and (np.diff(rollout.versions) >= 0).all()
        assert all(set(rollout.versions) == {engine.version} for future in late for rollout in future.result().rollouts)
    finally:
        engine.close()


def test_a_new_request_does_not_use_a_prefix_that_older_weights_computed(models):
    """A long response goes on meanwhile, so that the cache is not emptied."""
    path, found = models
    engine = engine_for(str(path))
    prompt = Prompt(0, np.tile(np.arange(2, 80, dtype=np.int32), 2), "", ("1",))  # longer than a block of the cache
    try:
        running = engine.submit(prompts(), LONG, round_index=0)
        engine.generate([prompt], LONG, round_index=0)
        load(Courier(engine, path), found[1], 1)
        unfinished = [future for future in running if not future.done()]
        [group] = engine.generate([prompt], LONG, round_index=1)
        for rollout in group.rollouts:
            expected = expected_log_probs(found, prompt.token_ids, rollout, {1: 1}, recompute=False)
            np.testing.assert_allclose(rollout.log_probs, expected, atol=1e-4)
        assert set(group.rollouts[0].versions) == {1} and all(future.result(timeout=200) for future in unfinished)
    finally:
        engine.close()


def test_each_turn_of_an_episode_is_made_by_the_weights_of_its_time(models):
    """What older weights computed of its earlier turns is not used for the next one."""
    path, found = models
    engine = engine_for(str(path), block_size=32)
    playing = Playing(engine, str(path), "three_turns", divided=False)
    plays.kept["between turns"] = lambda: load(Courier(engine, path), found[1], 1)
    try:
        one = SamplingConfig(samples_per_prompt=1, max_tokens=120)
        [future] = playing.submit(long_prompts(1), one, round_index=0)
        [rollout] = future.result(timeout=200).rollouts
        ids = np.concatenate([rollout.episode.prompt_ids, rollout.token_ids])
        first = int(np.flatnonzero(~rollout.sampled)[0])  # tokens of the first turn
        assert rollout.versions[rollout.sampled].tolist() == [0] * first + [1] * (rollout.num_sampled - first)
        assert rollout.policy_version == 0 and rollout.episode.turns == 3
        for version, turns in ((0, slice(0, first)), (1, slice(first, None))):
            with torch.no_grad():
                logits = found[version](torch.tensor(ids[None]).long()).logits[0, 49:-1]
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(rollout.token_ids).long()[:, None])[:, 0].numpy()
            chosen = rollout.sampled[turns]
            np.testing.assert_allclose(rollout.log_probs[turns][chosen], expected[turns][chosen], atol=1e-4)
    finally:
        playing.close()
        engine.close()


def test_a_queue_gives_prompts_to_who_has_room_and_the_tokens_are_the_same(models):
    """One engine is stopped: it holds up what it was given and no more."""
    path, _ = models
    engine = engine_for(str(path), engines=2, max_num_seqs=4)
    many, four = [prompt for _ in range(3) for prompt in prompts()], sampling(samples_per_prompt=4)
    try:
        expected = flat(engine.generate(many, four, round_index=0))  # divided
        os.kill(engine.process_ids[1], signal.SIGSTOP)
        futures = engine.submit(many, four, round_index=0)
        for future in (future for number, future in enumerate(futures) if number != 1):
            future.result(timeout=200)
        assert not futures[1].done(), "the second prompt went to the second engine"
        os.kill(engine.process_ids[1], signal.SIGCONT)
        found = flat([future.result(timeout=200) for future in futures])
        assert [row[:2] for row in found] == [row[:2] for row in expected]
    finally:
        engine.close()


def test_what_is_cancelled_is_dropped_and_the_rest_goes_on(models):
    path, _ = models
    engine = engine_for(str(path))
    try:
        expected = flat(engine.generate(prompts(), sampling(), round_index=0))
        first, *others = engine.submit([*prompts(1), *prompts()], LONG, round_index=0)
        assert first.cancel()
        again = engine.submit(prompts(), sampling(), round_index=0)
        assert flat([future.result(timeout=200) for future in again])[0][:2] == expected[0][:2]
        assert all(len(future.result(timeout=200).rollouts) == 6 for future in others)
        assert not engine._processes[0].requests
    finally:
        engine.close()
