"""The reward `choice`, row by row as docs/rewards.md says."""

import re
from pathlib import Path

import pytest

from pmpo_megatron.rewards import RewardPool
from pmpo_megatron.rewards.choice import choice

PAGE = Path(__file__).parents[3] / "docs/rewards.md"
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \| ([01]) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_has_its_rows():
    assert len(ROWS) >= 60 and len(set(ROWS)) == len(ROWS)


@pytest.mark.parametrize("options, answer, response, score", ROWS)
def test_the_decisions_of_the_documentation(options, answer, response, score):
    metadata = {} if options == "-" else {"options": options.split("; ")}
    assert choice(response, [answer], metadata) == float(score)


def test_the_layouts_of_data_sets():
    assert choice(r"\boxed{B}", ["B"], {"choices": {"text": ["red", "blue"], "label": ["A", "B"]}}) == 1.0  # ARC, CommonsenseQA
    assert choice(r"\boxed{blue}", ["1"], {"endings": ["red", "blue"]}) == 1.0  # HellaSwag
    with pytest.raises(ValueError, match="none of the options"):
        choice(r"\boxed{A}", ["green"], {"options": ["red", "blue"]})
    with pytest.raises(ValueError, match="a list of at most 26 texts"):
        choice(r"\boxed{A}", ["A"], {"options": "red, blue"})


def test_options_reach_the_function_through_the_pool():
    with RewardPool("choice", workers=1) as pool:
        metadata = [{"options": ["red", "blue"]}, {"options": ["blue", "red"]}]
        assert pool.score(["The answer is blue."] * 2, ["B", "B"], metadata) == [1.0, 0.0]


def test_hostile_lengths_take_no_time():
    for text in ("the answer is " * 20_000, r"\boxed{" + "(" * 100_000 + "A", "the answer is " + "A" * 10**6):
        assert choice(text, ["A"], {}) == 0.0
