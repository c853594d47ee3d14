"""Several sources in one run: how they are described, in what shares they are drawn, and what is reported of each."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from pmpo_megatron.config import build, to_plain
from pmpo_megatron.data.prompts import DataConfig, load_prompts
from pmpo_megatron.data.sampler import MixedSampler, PromptSampler, make_sampler
from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.hf.tiny_model import make_tokenizer
from pmpo_megatron.monitor.metrics import summarize
from pmpo_megatron.rewards import RewardConfig, RewardScorer, ScoredGroup
from pmpo_megatron.training.sources import objective_metrics, reward_metrics
from tests.rollouts import rollout

SIZES, WEIGHTS = {"math": 5, "code": 30, "choice": 7}, {"math": 1.0, "code": 2.5, "choice": 0.5}


def source_of(index):
    return "math" if index < 5 else "code" if index < 35 else "choice"


def test_every_source_has_its_share_at_any_time_and_goes_through_its_prompts():
    drawn = MixedSampler(SIZES, WEIGHTS, seed=3).next(400)
    names = [source_of(index) for index in drawn]
    for count in range(1, 401):
        for name, weight in WEIGHTS.items():
            assert abs(names[:count].count(name) - count * weight / 4) <= 1
    for name, size in SIZES.items():
        of_source = [index for index, source in zip(drawn, names, strict=True) if source == name]
        epochs = [of_source[start : start + size] for start in range(0, len(of_source) - size + 1, size)]
        assert len(epochs) > 1 and all(len(set(epoch)) == size for epoch in epochs) and epochs[0] != epochs[1]


def test_a_mixture_goes_on_where_a_checkpoint_left_it_and_refuses_another():
    whole = MixedSampler(SIZES, WEIGHTS, seed=3).next(101)
    sampler = MixedSampler(SIZES, WEIGHTS, seed=3)
    first = sampler.next(1) + sampler.next(40) + sampler.next(0)
    state = json.loads(json.dumps(sampler.state()))
    assert (state["num_prompts"], state["position"]) == (42, 41)
    later = MixedSampler(SIZES, WEIGHTS, seed=3)
    later.restore(state)
    assert first + later.next(60) == whole
    others = [({"math": 5, "code": 30}, WEIGHTS, 3), (SIZES, WEIGHTS, 4), (SIZES, WEIGHTS | {"math": 2.0}, 3)]
    for other in (MixedSampler(*values) for values in others):
        with pytest.raises(DataError, match="data (or seed )?changed"):
            other.restore(state)
    with pytest.raises(DataError, match="one alone"):
        MixedSampler(SIZES, WEIGHTS, 3).restore(PromptSampler(42, 3).state())


@pytest.fixture
def mixture(tmp_path):
    (tmp_path / "code.jsonl").write_text('{"problem": "print 1", "tests": ["assert 1"]}\n' * 3)
    code = {"source": str(tmp_path / "code.jsonl"), "answer_field": None, "template": "Run {problem}", "rewards": {"boxed": 2}}
    sources = {"sums": {"source": "arithmetic", "problems": 8, "weight": 3}, "code": code}
    return {"max_prompt_tokens": 32, "template": "{problem} ", "max_problems": 5, "sources": sources}


def test_each_source_has_its_own_fields_and_the_rest_in_common(mixture):
    config = build(DataConfig, mixture)
    assert build(DataConfig, to_plain(config)) == config
    tokenizer = make_tokenizer()
    prompts = load_prompts(config, tokenizer)
    assert [prompt.source for prompt in prompts.prompts] == ["sums"] * 5 + ["code"] * 3
    assert [prompt.index for prompt in prompts.prompts] == list(range(8))
    sums, code = prompts[0], prompts[5]
    assert tokenizer.decode(sums.token_ids) == sums.text + " " and tokenizer.decode(code.token_ids) == "Run print 1"
    assert (sums.rewards, code.rewards) == (None, {"boxed": 2.0})
    assert dict(sums.metadata) == {"level": 1, "source": "sums"} and code.metadata["source"] == "code"
    drawn = make_sampler(prompts.prompts, prompts.weights, seed=0).next(40)
    assert sum(index < 5 for index in drawn) == 30
    single = load_prompts(DataConfig(source="arithmetic", problems=4), tokenizer)
    assert isinstance(make_sampler(single.prompts, single.weights, 0), PromptSampler) and single[0].source == ""


@pytest.mark.parametrize(
    "change, words",
    [
        ({"source": "arithmetic"}, "source: is required, or sources; not both"),
        ({"sources": {}}, "source: is required, or sources"),
        ({"sources": {"a/b": {"source": "arithmetic"}}}, "sources: 'a/b': a name has letters"),
        ({"sources": {"a": {}}}, "sources.a.source: is required"),
        ({"sources": {"a": {"source": "arithmetic", "max_prompt_tokens": 9}}}, "sources.a: max_prompt_tokens stands beside"),
        ({"sources": {"a": {"source": "arithmetic", "wieght": 9}}}, "sources.a.*unknown key.*did you mean 'weight'"),
        ({"sources": {"a": {"source": "arithmetic", "weight": 0}}}, "sources.a.weight: 0.0 must be above 0"),
        ({"sources": {"a": {"source": "arithmetic", "rewards": {}}}}, "sources.a.rewards: is empty"),
        ({"sources": {"a": {"source": "arithmetic", "split": "x"}}}, "sources.a.split: 'x'"),
        ({"sources": {"a": 3}}, "sources.a: 3 is a int"),
    ],
)
def test_wrong_mixtures_are_named(mixture, change, words):
    with pytest.raises(ConfigError, match=words):
        build(DataConfig, mixture | change)


def group(source, rewards, rewards_of_prompt=None, texts=None):
    prompt = SimpleNamespace(source=source, answers=("4",), metadata={}, rewards=rewards_of_prompt)
    texts = texts or ["x"] * len(rewards)
    rollouts = tuple(rollout(text, length) for length, text in enumerate(texts, 1))
    return ScoredGroup(SimpleNamespace(prompt=prompt, rollouts=rollouts), tuple(rewards), tuple(r > 2 for r in rewards))


def test_what_is_reported_of_each_source():
    groups = [group("a", [0.0, 4.0]), group("b", [3.0, 3.0, 3.0]), group("a", [-2.0, 1.0])]
    numbers = summarize(reward_metrics(groups))
    assert numbers["source/a/reward_mean"] == 0.75 and numbers["source/b/reward_mean"] == 3.0
    assert numbers["source/a/accuracy"] == 0.25 and numbers["source/b/accuracy"] == 1.0
    assert numbers["source/a/informative_groups"] == 1.0 and numbers["source/b/informative_groups"] == 0.0
    assert numbers["source/a/length_mean"] == 1.5 and numbers["source/b/length_max"] == 3.0
    assert reward_metrics([group("", [0.0, 1.0])]) == {}
    steps = [([2, 0, 4], [0.5, 0.1, 0.9]), ([1, 3, 5], [0.2, 0.6, 0.4])]  # the steps of a round have samples in any order
    results = [
        SimpleNamespace(
            trajectories={
                "sample_id": np.array(ids),
                "p": np.array(p),
                "ess": np.array(p) * 10,
                "length": np.full(3, 20),
                "clip_fraction": np.array(p) / 2,
            }
        )
        for ids, p in steps
    ]
    numbers = summarize(objective_metrics(results, ["a", "a", "b", "b", "b", "a"]))
    for source, values in (("a", [0.1, 0.2, 0.4]), ("b", [0.5, 0.6, 0.9])):
        assert numbers[f"source/{source}/p_mean"] == pytest.approx(np.mean(values))
        assert numbers[f"source/{source}/p_max"] == max(values)
        assert numbers[f"source/{source}/ess_fraction"] == pytest.approx(np.mean(values) / 2)
        assert numbers[f"source/{source}/clip_fraction"] == pytest.approx(np.mean(values) / 2)
    assert objective_metrics(results, [""] * 6) == {}


def test_a_source_is_scored_by_its_own_functions():
    texts = [r"\boxed{4}", "4", r"\boxed{5}"]
    groups = [group("a", [0] * 3, None, texts).group, group("b", [0] * 3, {"boxed": 2.0, "math": -1.0}, texts).group]
    scorer = RewardScorer(RewardConfig(workers=1), max_tokens=9, functions=["math", "boxed"])
    scores = scorer.score(groups)
    scorer.close()
    assert scores[0] == ((1.0, 1.0, 0.0), (True, True, False))
    assert scores[1] == ((1.0, -1.0, 2.0), (True, False, True)), "correct is what the first of its own functions says"
    assert {name: stats.calls for name, stats in scorer.pool.stats.functions.items()} == {"math": 6, "boxed": 3}
