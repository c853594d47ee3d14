"""Reward functions: (response, accepted answers) -> float in [0, 1]. They run in workers and may take as long as they like."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards.extraction import LONGEST_ANSWER, boxed_answers, extract_answer

RewardFunction = Callable[[str, Sequence[str]], float]

# Spellings of the same thing, made one before texts are compared.
SPELLINGS = [
    (re.compile(r"\\(?:left|right|displaystyle|,|;|!|quad|qquad)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree|°"), ""),
    (re.compile(r"\\?%"), ""),
    (re.compile(r"(?<=\d)[,](?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\\$|\$|~|\s+"), ""),
    (re.compile(r"\.$"), ""),
]


def math(response: str, answers: Sequence[str]) -> float:
    """1.0 if the response's final answer equals one of ``answers``, by spelling or by math-verify; else 0.0."""
    found = extract_answer(response)
    return float(found is not None and any(same_answer(found, answer) for answer in answers))


def boxed(response: str, answers: Sequence[str]) -> float:
    r"""1.0 if the response has exactly one ``\boxed{}``, whatever its content: a reward for format."""
    return float(len(boxed_answers(response)) == 1)


def exact(response: str, answers: Sequence[str]) -> float:
    """1.0 if the whole response is one of ``answers``, spaces at the ends aside."""
    return float(response.strip() in {answer.strip() for answer in answers})


BUILT_IN: dict[str, RewardFunction] = {"math": math, "boxed": boxed, "exact": exact}


def find_function(name: str) -> RewardFunction:
    """A built-in function, or what ``package.module:name`` imports.

    Raises:
        ConfigError: there is no such function.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            "rewards.functions", f"{name!r} is none of {', '.join(BUILT_IN)}, nor of the form package.module:name"
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError("rewards.functions", f"{name!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ConfigError("rewards.functions", f"{name!r} is a {type(function).__name__}, not a function")
    return function


def same_answer(found: str, answer: str) -> bool:
    """Whether two final answers mean the same: equal after `spelling`, or equal to math-verify."""
    if len(found) > LONGEST_ANSWER:
        return False
    left, right = spelling(found), spelling(answer)
    if left == right:
        return bool(left)
    # "M = 9/32" answers "9/32": a name in front of the value is not part of it, if the value is all that is asked for.
    if right.count("=") == 1 and right.split("=")[1] == left or left.count("=") == 1 and left.split("=")[1] == right:
        return True
    return _verify(found, answer)


def spelling(answer: str) -> str:
    """``answer`` without what does not change its meaning: sizes of brackets, spaces, units' braces, thousands' commas."""
    for pattern, replacement in SPELLINGS:
        answer = pattern.sub(replacement, answer)
    return answer


def _verify(found: str, answer: str) -> bool:
    """math-verify on both answers. Its own time-outs use SIGALRM and are off: the pool's are hard."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold, target = (parse(rf"\boxed{{{text.strip().strip('$')}}}", kinds, parsing_timeout=None) for text in (answer, found))
    return bool(gold and target) and bool(verify(gold, target, timeout_seconds=None))
