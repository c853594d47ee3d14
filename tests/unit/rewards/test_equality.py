"""The grader `math`, row by row as docs/rewards.md says; and the arithmetic task, whose problem is no answer."""

import random
import re
from pathlib import Path

import pytest

from pmpo_megatron.rewards import RewardConfig, RewardPool, RewardScorer
from pmpo_megatron.rewards.functions import math
from pmpo_megatron.rewards.structure import is_value
from pmpo_megatron.rewards.units import split_unit

PAGE = Path(__file__).parents[3] / "docs/rewards.md"
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_has_its_rows():
    assert len(ROWS) >= 100 and len(set(ROWS)) == len(ROWS)


@pytest.mark.parametrize("answer, found, accepted", ROWS)
def test_the_decisions_of_the_documentation(answer, found, accepted):
    assert math(rf"\boxed{{{found}}}", [answer]) == (accepted == "yes")


@pytest.mark.parametrize("answer", sorted({answer for answer, _, _ in ROWS}))
def test_every_answer_of_the_table_is_accepted_for_itself(answer):
    assert math(rf"\boxed{{{answer}}}", [answer]) == 1.0


def test_the_problem_of_the_arithmetic_task_is_no_answer_unless_the_rule_is_off():
    generator = random.Random(0)
    pairs = [(generator.randrange(1, 1000), generator.choice("+-"), generator.randrange(1, 1000)) for _ in range(50)]
    responses = [rf"\boxed{{{a}{sign}{b}}}" for a, sign, b in pairs]
    answers = [[str(a + b if sign == "+" else a - b)] for a, sign, b in pairs]
    for evaluated, score in ((True, 0.0), (False, 1.0)):
        with RewardPool("math", workers=1, evaluated=evaluated) as pool:
            assert pool.score(responses, answers) == [score] * len(pairs)


def test_the_scorer_hands_the_rule_on():
    for evaluated in (True, False):
        scorer = RewardScorer(RewardConfig(workers=1, evaluated=evaluated), max_tokens=9)
        assert scorer.pool.score([r"\boxed{17+25}"], ["42"]) == [float(not evaluated)]
        scorer.close()


@pytest.mark.parametrize(
    "text, value, unit",
    [
        (r"15\mbox{ cm}^2", "15", "cm2"),
        ("5 km", "5", "km"),
        ("6m", "6m", ""),
        (r"\$36", "36", "dollar"),
        (r"\text{east}", r"\text{east}", ""),
        (r"1950^\circ C", "1950", "degree"),
        (r"4 \text{ square inches}", "4", "in2"),
    ],
)
def test_units(text, value, unit):
    assert split_unit(text) == (value, unit)


def test_scientific_notation_is_a_value_but_a_power_is_not():
    from sympy import Pow

    assert is_value(r"1.5\times10^{3}", None)
    assert not is_value("10^3", Pow(10, 3, evaluate=False))
