"""Reward functions: (response, accepted answers) -> float in [0, 1]. They run in workers and may take as long as they like."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards.extraction import LONGEST_ANSWER, boxed_answers, extract_answer

RewardFunction = Callable[[str, Sequence[str]], float]

# Spellings of the same thing, made one before texts are compared. Nothing here may change a meaning: "1 1/2" is not "11/2".
SPELLINGS = [
    (re.compile(r"\\(?:left|right|displaystyle|,|;|!|quad|qquad)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree|°"), ""),
    (re.compile(r"\\?%"), ""),
    (re.compile(r"\\\$|\$|~"), ""),
    (re.compile(r"\s+(?!\d)|(?<!\d)\s+"), ""),
    (re.compile(r"\.$"), ""),
]
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:[, ]\d{3})+(?![\d,])")
BRACKET = re.compile(r"[(\[{]")  # inside brackets a comma separates: (1,000) is a pair
MIXED = re.compile(r"^\s*(-?\d+)\s+(\d+)/(\d+)\s*$")
LIST = re.compile(r"[^()\[\]=]*,[^()\[\]=]*")
BRACKETED = re.compile(r"\([^()]*\)")
ARITHMETIC = re.compile(r"(?:\\(?:frac|sqrt|times|cdot|div|binom)(?![a-zA-Z])|[\d+\-*/^(){}.!])+")
NAME = re.compile(r"(?:\\?[a-zA-Z]+)(?:_(?:\w|\{\w+\}))?(?:\([a-zA-Z](?:,[a-zA-Z])*\))?'?")
BASE = re.compile(r"\w+_\{?(\d+)\}?")


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
    if module == "__main__":
        raise ConfigError("rewards.functions", f"{name!r}: workers import functions, and __main__ is not a module of theirs")
    if not colon:
        raise ConfigError(
            "rewards.functions", f"{name!r} is none of {', '.join(BUILT_IN)}, nor of the form package.module:name"
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a plug-in's own module may raise anything
        raise ConfigError("rewards.functions", f"{name!r} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise ConfigError("rewards.functions", f"{name!r} is a {type(function).__name__}, not a function")
    return function


def same_answer(found: str, answer: str) -> bool:
    """Whether two final answers mean the same: equal after `spelling`, or equal to math-verify."""
    if len(found) > LONGEST_ANSWER:
        return False
    found, answer = (MIXED.sub(r"\1\\frac{\2}{\3}", text) for text in (found, answer))
    left, right = spelling(found), spelling(answer)
    if left == right or _words(left) == _words(right) != "":
        return bool(left)
    # "M = 9/32" answers "9/32": a name in front of the value is not part of it, if the value is all that is asked for.
    if _without_name(left) == right or left == _without_name(right):
        return True
    bases = [BASE.fullmatch(text) for text in (left, right)]
    if all(bases) and bases[0][1] != bases[1][1]:  # math-verify drops the base of a number
        return False
    if BRACKETED.fullmatch(left) and LIST.fullmatch(right) or BRACKETED.fullmatch(right) and LIST.fullmatch(left):
        # A pair may come without its brackets, but in its order; math-verify would take the list as a set.
        found, answer = (text if BRACKETED.fullmatch(text) else f"({text})" for text in (left, right))
    return _verify(found, answer) and not _false_arithmetic(left) and not _false_arithmetic(right)


def spelling(answer: str) -> str:
    """``answer`` without what does not change its meaning: sizes of brackets, spaces, units' braces, thousands' commas."""
    for pattern, replacement in SPELLINGS:
        answer = pattern.sub(replacement, answer)
    if not BRACKET.search(answer):
        answer = THOUSANDS.sub(lambda number: re.sub("[, ]", "", number[0]), answer)
    return answer


def _words(text: str) -> str:
    """A text of words in lower case; "" for anything else: one or two letters are variables, whose case counts."""
    return text.lower() if len(text) > 2 and text.isalpha() else ""


def _without_name(text: str) -> str | None:
    """The value of "x=value"; None without a name, or with more behind it than one value."""
    name, equals, value = text.partition("=")
    return value if equals and "=" not in value and NAME.fullmatch(name) else None


def _false_arithmetic(text: str) -> bool:
    """Whether ``text`` says "2+2=3", whose value math-verify takes for 3. "m+n=3" names what is 3."""
    *left, value = text.split("=")
    return any(ARITHMETIC.fullmatch(side) and not _verify(side, value) for side in left)


def _verify(found: str, answer: str) -> bool:
    """math-verify on both answers. Its own time-outs use SIGALRM and are off: the pool's are hard."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold, target = (parse(rf"\boxed{{{text.strip().strip('$')}}}", kinds, parsing_timeout=None) for text in (answer, found))
    return bool(gold and target) and bool(verify(gold, target, timeout_seconds=None))
