"""Rewards: extraction, equality, hostile text, workers that hang or die, plug-ins, composition."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards import RewardConfig, RewardPool, RewardScorer
from pmpo_megatron.rewards.extraction import boxed_answers, extract_answer

DATA = Path(os.environ.get("PMPO_DATA", Path(__file__).parents[4] / "shared/data"))


@pytest.fixture(scope="module")
def pool():
    with RewardPool("math", workers=2, timeout=5.0) as pool:
        yield pool


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{a }\{b\}}", r"\text{a }\{b\}"),
        (r"\boxed{x \boxed{3}}", r"x \boxed{3}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{5} or \boxed{unclosed", "5"),
        (r"\boxed{unclosed and then \boxed{6}", "6"),
        ("it is 12, or rather 1,234.5.", "1,234.5"),
        ("no idea", None),
        ("", None),
    ],
)
def test_extraction(response, answer):
    assert extract_answer(response) == answer


def test_boxes_come_in_order():
    assert boxed_answers(r"\boxed{1}\fbox{2}\boxed{{3}}") == ["1", "2", "{3}"]


@pytest.mark.parametrize(
    "response, answer, score",
    [
        (r"\boxed{\frac12}", "0.5", 1),
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", 1),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1),
        (r"\boxed{(1, 2)}", r"(1,2)", 1),
        (r"\boxed{[0,1)}", r"(0,1]", 0),
        (r"\boxed{10,000}", "10000", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{\text{east}}", "east", 1),
        (r"\boxed{x+1}", "1+x", 1),
        (r"\boxed{3}", "4", 0),
        (r"\boxed{}", "", 0),
        (r"\boxed{4} but the answer 3 is elsewhere", "3", 0),
        (r"\boxed{3} no, \boxed{4}", "3", 0),
        ("42", "42", 1),
        ("", "42", 0),
        (r"\boxed{7}", ["6", "7"], 1),
        (r"\boxed{8}", ["6", "7"], 0),
    ],
)
def test_scores(pool, response, answer, score):
    assert pool.score([response], [answer]) == [score]


HOSTILE = [
    r"\boxed{" * 200_000,
    "{" * 3_000_000,
    r"\boxed{" + "{" * 2_000_000 + "}" * 2_000_000 + "}",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{9^{9^{9^{9^9}}}!}",
    r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "\\boxed{\x00}",
    "\ud800 \\boxed{\ud800}",
    r"\boxed{\frac{\frac{\sqrt[",
    r"\boxed{" + "1+" * 900 + "}",
    r"\boxed{\int_0^{10^{100}} x^{x^{x}} dx}",
]


def test_hostile_text_costs_at_most_its_time_out():
    with RewardPool("math", workers=2, timeout=2.0) as pool:
        pool.score(["1", "1"], ["1", "1"])
        started = time.monotonic()
        scores = pool.score([*HOSTILE, r"\boxed{5}"], ["3"] * len(HOSTILE) + ["5"])
        assert scores == [0.0] * len(HOSTILE) + [1.0]
        assert time.monotonic() - started < 2.0 * len(HOSTILE) + 20  # and a start for each worker that had to be replaced


def misbehave(response, answers):
    if response == "hang":
        while True:
            pass
    if response == "die":
        os._exit(3)
    if response == "raise":
        raise RuntimeError("no")
    if response == "print":
        print("noise on standard output")
    return {"nan": float("nan"), "big": 7.0}.get(response, 0.5)


def test_hung_and_dead_workers_cost_their_item_alone_and_order_is_kept():
    with RewardPool(f"{__name__}:misbehave", workers=2, timeout=1.5) as pool:
        responses = ["a", "hang", "b", "die", "raise", "print", "nan", "big"] + ["c"] * 30 + ["die", "d"]
        expected = [0.5, 0, 0.5, 0, 0, 0.5, 0, 1.0] + [0.5] * 30 + [0, 0.5]
        assert pool.score(responses, ["x"] * len(responses)) == expected
        assert (pool.stats.timeouts, pool.stats.crashes, pool.stats.scored) == (1, 2, 40)
        assert pool.stats.errors == {"RuntimeError: no": 1}
        assert pool.score([], []) == []
        with pytest.raises(ValueError, match="2 responses but 1 answers"):
            pool.score(["a", "b"], ["x"])


def test_unknown_functions_are_refused_before_anything_starts():
    for name in ("maths", "no.such.module:f", "json:nothing", "math:pi"):
        with pytest.raises(ConfigError, match="rewards.functions"):
            RewardPool(name)


def test_composition_and_overlong_penalty():
    config = RewardConfig(functions={"math": 1.0, "boxed": 0.5}, workers=1, overlong_penalty=1.0, overlong_tokens=10)
    scorer = RewardScorer(config, max_tokens=100)
    rollout = lambda text, length: SimpleNamespace(text=text, token_ids=(0,) * length)  # noqa: E731
    prompt = SimpleNamespace(answers=("4",))
    items = [(prompt, rollout(*r)) for r in ((r"\boxed{4}", 20), ("4", 20), (r"\boxed{3}", 95), (r"\boxed{4}", 100))]
    assert scorer.score_rollouts(items) == [1.5, 1.0, 0.0, 0.5]
    scorer.close()


@pytest.mark.skipif(not (DATA / "eval").is_dir(), reason=f"no data in {DATA}; set PMPO_DATA")
@pytest.mark.parametrize("name", ["aime24", "amc23", "math500", "minerva", "olympiadbench", "gsm8k"])
def test_own_answers_are_accepted_and_others_are_not(pool, name):
    answers = [json.loads(line)["answer"] for line in (DATA / "eval" / f"{name}.jsonl").read_text().splitlines()]
    own = pool.score([rf"\boxed{{{a}}}" for a in answers], answers)
    assert sum(own) / len(own) >= 0.99
    if name in ("aime24", "amc23", "gsm8k"):  # other answers that are not equal as numbers
        shifted = answers[1:] + answers[:1]
        different = [
            i
            for i, (a, b) in enumerate(zip(answers, shifted, strict=True))
            if float(a.replace(",", "")) != float(b.replace(",", ""))
        ]
        assert sum(pool.score([rf"\boxed{{{shifted[i]}}}" for i in different], [answers[i] for i in different])) == 0
