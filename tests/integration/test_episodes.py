"""Episodes on a real vLLM: their tokens, log-probs and cache, their order, what ends them, and engines that die meanwhile."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards import RewardConfig, RewardScorer
from pmpo_megatron.rollout.config import EpisodeConfig, RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.episodes import EpisodeEngine, find_episode
from pmpo_megatron.rollout.replay import RecordingEngine, ReplayEngine
from pmpo_megatron.types import Prompt
from tests.integration import plays
from tests.integration.engine_worker import engine_for, prompts, save_model
from tests.integration.rewards import letters
from tests.integration.runs import wait_until
from tests.integration.test_rollout import flat

SAMPLING = SamplingConfig(samples_per_prompt=3, max_tokens=120, temperature=1.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model("qwen2", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def engine(path):
    made = engine_for(path, block_size=32)
    yield made
    made.close()


class Playing(EpisodeEngine):
    """Episodes of the function ``name`` of `plays` on an engine that is kept when they are over."""

    def __init__(self, engine, path, name, *, divided=True, **settings):
        config = EpisodeConfig(function=f"tests.integration.plays:{name}", **settings)
        super().__init__(engine, config, model_path=path, longest_prompt=60, divided=divided)

    def close(self):
        self._engine = type("Kept", (), {"close": lambda self: None})()
        super().close()


@pytest.fixture
def play(engine, path):
    made = []

    def of(name, **settings):
        made.append(Playing(engine, path, name, **settings))
        return made[-1]

    yield of
    for playing in made:
        playing.close()


def rollouts_of(groups):
    return [rollout for group in groups for rollout in group.rollouts]


def hugging_face(path, ids, temperature=1.0):
    """Log-prob of every token after the first, by one pass over the whole trajectory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(ids[None]).long()).logits[0, :-1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(ids[1:]).long()[:, None])[:, 0].numpy()


def test_three_turns_are_one_trajectory_token_by_token(play, path):
    sampling = SamplingConfig(samples_per_prompt=3, max_tokens=120, temperature=0.8)
    groups = play("three_turns").generate(prompts(), sampling, round_index=0)
    tokenizer = load_tokenizer(path)
    for group in groups:
        for rollout in group.rollouts:
            ids, sampled = np.concatenate([group.prompt.token_ids, rollout.token_ids]), rollout.sampled
            expected = hugging_face(path, ids, temperature=0.8)[len(group.prompt.token_ids) - 1 :]
            np.testing.assert_allclose(rollout.log_probs[sampled], expected[sampled], atol=1e-4)
            assert (rollout.log_probs[~sampled] == 0).all() and (rollout.versions[sampled] == 0).all()
            assert rollout.token_ids[~sampled].tolist() == [*tokenizer.encode("0123456789" * 4), 7, 8, 9]
            assert rollout.episode.turns == 3 and 3 <= rollout.num_sampled <= 27 and rollout.finish_reason == "stop"
            assert rollout.episode.failure == "" and rollout.episode.reward >= 0
            assert rollout.text == tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
    assert len({tuple(rollout.token_ids.tolist()) for rollout in rollouts_of(groups)}) == 12, "each has seeds of its own"


def check_cache(groups):
    """Of three turns after a prompt of 50 tokens: whole blocks of 32 of all but the last of a turn's tokens."""
    for rollout in rollouts_of(groups):
        first, told, second, further, _ = np.split(rollout.token_ids, np.flatnonzero(np.diff(rollout.sampled.astype(int))) + 1)
        before_second = 50 + len(first) + len(told)
        before_third = before_second + len(second) + len(further)
        assert rollout.episode.asked == before_second + before_third
        computed = (50 + len(first) - 1, before_second + len(second) - 1)
        assert rollout.episode.cached == sum(32 * (tokens // 32) for tokens in computed) > 0


def long_prompts(count):
    return [Prompt(index, np.arange(2, 52, dtype=np.int32) + index, "", ("1",)) for index in range(count)]


def test_the_next_turn_reuses_keys_and_values(play):
    check_cache(play("three_turns").generate(long_prompts(1), SAMPLING, round_index=5))


def test_an_episode_of_one_turn_is_the_ordinary_response_bit_by_bit(play, engine):
    plain = engine.generate(prompts(), SAMPLING, round_index=3)
    for divided in (True, False):
        groups = play("once", divided=divided).generate(prompts(), SAMPLING, round_index=3)
        assert [row[:2] for row in flat(groups)] == [row[:2] for row in flat(plain)]
        if divided:
            assert flat(groups) == flat(plain)
        for one, other in zip(rollouts_of(groups), rollouts_of(plain), strict=True):
            assert (one.finish_reason, one.seed, one.text) == (other.finish_reason, other.seed, other.text)
            assert one.sampled.all() and one.episode.reward == len(one.text)


def test_a_divided_round_has_the_same_bits_whatever_the_clock_does(play):
    first, second = (play("unsteady").generate(prompts(), SAMPLING, round_index=8) for _ in range(2))
    assert flat(first) == flat(second)
    assert len({rollout.episode.turns for rollout in rollouts_of(first)}) > 1
    queued = play("unsteady", divided=False).generate(prompts(), SAMPLING, round_index=8)
    assert [row[:2] for row in flat(queued)] == [row[:2] for row in flat(first)]
    submitted = [future.result(timeout=100) for future in play("unsteady").submit(prompts(), SAMPLING, round_index=8)]
    assert [row[:2] for row in flat(submitted)] == [row[:2] for row in flat(first)]


def test_what_ends_an_episode_scores_0_and_is_counted_by_kind(play, caplog):
    playing = play("failing", timeout_s=1.0, max_turns=6)
    groups = playing.generate(prompts(8), SAMPLING, round_index=0)
    kinds = [{rollout.episode.failure for rollout in group.rollouts} for group in groups]
    kinds_wanted = ["ZeroDivisionError", "seconds", "turns", "tokens", "SystemExit", "ValueError", "ValueError", ""]
    assert kinds == [{kind} for kind in kinds_wanted]
    assert all(rollout.episode.reward == 0 for group in groups[:7] for rollout in group.rollouts)
    assert {len(rollout.token_ids) <= 4 for rollout in groups[0].rollouts} == {True}, "what was sampled stays"
    assert {rollout.episode.turns for rollout in groups[2].rollouts} == {6}
    assert {rollout.finish_reason for rollout in groups[3].rollouts} == {"length"}
    assert "an episode failed by ZeroDivisionError: ZeroDivisionError: division by zero (" in caplog.text
    assert caplog.text.count("plays.py") == 6 and caplog.text.count("division by zero") == 1, "each kind once, with its line"
    last = groups[7].rollouts[0].episode
    assert (last.reward, last.correct, last.metrics) == (2.5, False, {"calls": 3})
    with pytest.raises(RuntimeError, match="the episode is over"):
        plays.kept["policy"].tell("more")


def test_an_episode_that_holds_up_all_others_is_named(play, monkeypatch, caplog):
    monkeypatch.setattr("pmpo_megatron.rollout.episodes.BLOCKED_S", 0.3)
    play("blocking").generate(prompts(1), SAMPLING, round_index=0)
    line = 1 + Path(plays.__file__).read_text().splitlines().index("    time.sleep(1.5)")
    assert f"no episode has moved for 0.3 s: {plays.__file__}:{line} does not await" in caplog.text


@pytest.mark.parametrize("divided", [True, False])
def test_functions_score_an_episode_that_returns_no_reward(play, divided):
    groups = play("scored_by_functions", divided=divided).generate(prompts(2), SAMPLING, round_index=0)
    groups.append(play("once").generate(prompts(1), SAMPLING, round_index=0)[0])
    scorer = RewardScorer(RewardConfig(functions={"tests.integration.rewards:letters": 2.0}, workers=1), max_tokens=120)
    scored = scorer.score(groups)
    scorer.close()
    for group, (rewards, correct) in zip(groups[:2], scored[:2], strict=True):
        assert rewards == tuple(2.0 * letters(rollout.text, []) for rollout in group.rollouts)
        assert correct == tuple(reward / 2 >= 0.5 for reward in rewards)
    assert scored[2][0] == tuple(len(rollout.text) for rollout in groups[2].rollouts)


def test_recorded_episodes_come_back_bit_by_bit(play, tmp_path):
    recording = RecordingEngine(play("unsteady"), tmp_path / "rollouts.jsonl")
    made = recording.generate(prompts(), SAMPLING, round_index=0)
    replay = ReplayEngine(RolloutConfig(engine="replay", replay_from=str(tmp_path / "rollouts.jsonl")))
    found = replay.generate(prompts(), SAMPLING, round_index=0)
    assert flat(found) == flat(made)
    for one, other in zip(rollouts_of(found), rollouts_of(made), strict=True):
        for name, value in vars(other.episode).items():
            assert np.array_equal(getattr(one.episode, name), value), name


class TestTwoEngines:
    @pytest.fixture(scope="class")
    def two(self, path):
        made = engine_for(path, engines=2, block_size=32)
        yield made
        made.close()

    @pytest.mark.parametrize("divided", [True, False])
    def test_the_next_turn_goes_where_the_keys_and_values_are(self, two, path, divided):
        playing = Playing(two, path, "three_turns", divided=divided)
        check_cache(playing.generate(long_prompts(5), SAMPLING, round_index=5 + divided))
        playing.close()

    def test_one_that_dies_in_an_episode_is_replaced_and_the_episode_goes_on(self, two, path):
        playing, restarts = Playing(two, path, "unsteady"), []
        expected = flat(playing.generate(prompts(), SAMPLING, round_index=0))
        two.on_restart = restarts.append
        plays.kept["between turns"] = lambda: os.kill(two.process_ids[1], signal.SIGKILL)
        found = flat(playing.generate(prompts(), SAMPLING, round_index=0))
        assert [row[:2] for row in found] == [row[:2] for row in expected]
        wait_until(lambda: restarts, timeout=250, what="the restart")
        playing.close()


def test_a_group_that_is_cancelled_leaves_nothing_behind(play, engine):
    playing = play("unsteady", divided=False)
    first, *others = playing.submit(prompts(), SAMPLING, round_index=1)
    time.sleep(0.1)
    assert first.cancel()
    assert all(len(future.result(timeout=100).rollouts) == 3 for future in others)
    deadline = time.monotonic() + 60
    while engine._jobs or engine._processes[0].requests:
        assert time.monotonic() < deadline, "requests of the cancelled episodes are still under way"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tests.integration.plays:no_such", "cannot be imported"),
        ("tests.integration.plays:not_async", "must be an async def"),
        ("tests.integration.plays:one_argument", r"must be a function of \(prompt, policy\)"),
    ],
)
def test_what_is_no_episode_is_refused(name, words):
    with pytest.raises(ConfigError, match=f"episode.function: .*{words}"):
        find_episode(name)


def test_the_guides_file_is_an_episode(tmp_path, monkeypatch):
    """docs/rollouts.md: its file, written as it stands there; and its program behind a base_url."""
    page = (Path(__file__).parents[2] / "docs/rollouts.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.syspath_prepend(tmp_path)
    for number, block in enumerate(blocks):
        (tmp_path / f"guide{number}.py").write_text(block)
        find_episode(f"guide{number}:episode")
    assert len(blocks) == 2
