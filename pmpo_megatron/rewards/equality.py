"""Whether two final answers mean the same, by spelling and by math-verify. The decisions are tabulated in docs/rewards.md."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pmpo_megatron.rewards.extraction import LONGEST_ANSWER
from pmpo_megatron.rewards.structure import is_value, numeric_functions, operators
from pmpo_megatron.rewards.units import split_unit

if TYPE_CHECKING:
    from sympy import Basic

# Spellings of the same thing, made one before texts are compared. Nothing here may change a meaning: "1 1/2" is not "11/2".
SPELLINGS = [
    (re.compile(r"\\(?:left|right|displaystyle|,|;|!|quad|qquad)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"\\(le|ge)(?:q|qslant)(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree|°"), ""),
    (re.compile(r"\\\$|\$|~"), ""),
    (re.compile(r"\^\s*\{\s*\\prime\s*\}|\^\s*\\prime"), "'"),
    (re.compile(r"\s+(?!\d)|(?<!\d)\s+"), ""),
    (re.compile(r"\.$"), ""),
]
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|,\\!\s*| )\d{3})+(?![\d,]|\s*,\s*\d)")
BRACKET = re.compile(r"[(\[{]")  # inside brackets a comma separates: (1,000) is a pair
MIXED = re.compile(r"^\s*(-?)(\d+)(?:\s+(\d+)/(\d+)|\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}|\s*\\[dt]?frac(\d)(\d))\s*$")
EXPONENT = re.compile(r"^\s*([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)\s*$")
LIST = re.compile(r"[^()\[\]=]*,[^()\[\]=]*")
BRACKETED = re.compile(r"\([^()]*\)")
ARITHMETIC = re.compile(r"(?:\\(?:frac|sqrt|times|cdot|div|binom)(?![a-zA-Z])|[\d+\-*/^(){}.!])+")
NAME = re.compile(r"(?:\\?[a-zA-Z]+)(?:_(?:\w|\{\w+\}))?(?:\([a-zA-Z](?:,[a-zA-Z])*\))?'?")
LETTERS = re.compile(r"\\?[a-zA-Z]+'*")
BASE = re.compile(r"\w+_\{?(\d+)\}?")
INTEGER = re.compile(r"[-+]?[0-9]{1,1000}")
INEQUALITY = re.compile(r"<|>|\\[lg](?:e|t)(?![a-zA-Z])")
AND = re.compile(r"\s*,?\s*(?:\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*")


def same_answer(found: str, answer: str, *, evaluated: bool = True) -> bool:
    """Whether two final answers mean the same: equal after `spelling`, or equal to math-verify.

    Args:
        evaluated: an expression that is still to be evaluated is no answer, unless ``answer`` is one.
    """
    if len(found) > LONGEST_ANSWER:
        return False
    if spelling(found) == spelling(answer) != "":
        return True
    (found, unit), (answer, wanted) = (split_unit(_undelimited(text)) for text in (found, answer))
    if unit and wanted and unit != wanted:
        return False
    found, answer = _plain(found), _plain(answer)
    left, right = spelling(found), spelling(answer)
    if not left or not right:
        return False
    if left == right:
        return True
    if INTEGER.fullmatch(left) and INTEGER.fullmatch(right):  # most answers; math-verify needs a millisecond for it
        return int(left) == int(right)
    if LETTERS.fullmatch(left) and LETTERS.fullmatch(right):
        return _same_letters(left, right)
    if "=" in left and "=" not in right:
        value = _value(left)
        return value is not None and same_answer(value, right, evaluated=evaluated)
    if _without_name(right) == left:
        return True
    return _same_kind(left, right) and _same_value(left, right, evaluated=evaluated)


def spelling(answer: str) -> str:
    """``answer`` without what does not change its meaning: sizes of brackets, spaces, units' braces, thousands' commas."""
    if not BRACKET.search(answer):
        answer = THOUSANDS.sub(lambda number: re.sub(r"[^\d]", "", number[0]), answer)
    for pattern, replacement in SPELLINGS:
        answer = pattern.sub(replacement, answer)
    return answer


def _undelimited(text: str) -> str:
    """``text`` without the dollars of mathematics; an escaped dollar is money."""
    return re.sub(r"(?<!\\)\$", "", text).strip().rstrip(".")


def _plain(text: str) -> str:
    """``text`` with mixed numbers as fractions, 1e5 as a product, and "and" as a comma."""
    if mixed := MIXED.match(text):
        sign, whole, top, bottom = mixed[1], mixed[2], *[part for part in mixed.groups()[2:] if part]
        return rf"{sign}\frac{{{int(whole) * int(bottom) + int(top)}}}{{{bottom}}}"
    text = EXPONENT.sub(r"\1\\times10^{\2}", text)
    return AND.sub(",", text)


def _same_letters(left: str, right: str) -> bool:
    """Words in any case; a name, or points in a row, letter by letter. A product of two variables may be turned round."""
    if len(left) > 3 or left.istitle() or right.istitle():
        return len(left) > 2 and left.lower() == right.lower()
    return len(left) == 2 and left.islower() and left == right[::-1]


def _value(text: str) -> str | None:
    """What "x=5" and "2+2=4" say is the value; None where the equation is no name's, is false, or says more."""
    *sides, value = text.split("=")
    for side in sides:
        if ARITHMETIC.fullmatch(side):
            if not _verify(_parse(side), _parse(value)):
                return None
        elif not side or operators(side) or _names(side) & _names(value):
            return None
        elif len(sides) > 1 or not (NAME.fullmatch(side) or re.fullmatch(r"[a-zA-Z](?:[+\-][a-zA-Z])+", side)):
            return None
    return value


def _names(text: str) -> set[str]:
    return {name for name in re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", re.sub(r"\([a-z](?:,[a-z])*\)$", "", text))}


def _without_name(text: str) -> str | None:
    """The value of "x=value"; None without a name, or with more behind it than one value."""
    name, equals, value = text.partition("=")
    return value if equals and "=" not in value and NAME.fullmatch(name) else None


def _same_kind(left: str, right: str) -> bool:
    """Whether both are of one kind: base, brackets, inequality, primes, and no operator that the answer has not."""
    bases = [match and match[1] for match in (BASE.fullmatch(left), BASE.fullmatch(right))]
    if bases[0] != bases[1] and re.search(r"\d_", left + right):
        return False
    if left.count("'") != right.count("'"):
        return False
    if LETTERS.fullmatch(left) or LETTERS.fullmatch(right):
        return False  # math-verify ignores the case of a single name
    kinds = [(text[:1] if text[:1] in "([" else r"\{" if text.startswith(r"\{") else "") for text in (left, right)]
    if r"\{" in kinds and "(" in kinds and all(text[-1] in ")]}" for text in (left, right)):
        return False
    if bool(INEQUALITY.search(left)) != bool(INEQUALITY.search(right)) and not re.search(r"[(\[]|\\in", left + right):
        return False
    return operators(left) <= operators(right)


def _same_value(left: str, right: str, *, evaluated: bool) -> bool:
    if BRACKETED.fullmatch(left) and LIST.fullmatch(right) or BRACKETED.fullmatch(right) and LIST.fullmatch(left):
        # A pair may come without its brackets, but in its order; math-verify would take the list as a set.
        left, right = (text if BRACKETED.fullmatch(text) else f"({text})" for text in (left, right))
    target, gold = _parse(left), _parse(right)
    if target is None or gold is None:
        return False
    if _other_variables(target, gold) or _other_small_number(target, gold):
        return False
    if evaluated and is_value(right, gold):
        if not is_value(left, target) or not numeric_functions(target) <= numeric_functions(gold):
            return False
    return _verify(target, gold)


def _other_variables(target: Basic, gold: Basic) -> bool:
    """Whether two formulas are of different variables; simplifying their difference would take long to say so."""
    from sympy import Expr

    if not (isinstance(target, Expr) and isinstance(gold, Expr)):
        return False
    return {str(symbol) for symbol in target.free_symbols} != {str(symbol) for symbol in gold.free_symbols}


def _other_small_number(target: Basic, gold: Basic) -> bool:
    """Whether two numbers near 0 differ by more than 1e-4 of them; math-verify rounds to 6 decimals: 4.6e-24 would be 1e-27."""
    from sympy import Expr, Float

    if not all(isinstance(number, Expr) and not number.free_symbols for number in (target, gold)):
        return False
    if not (target.has(Float) or gold.has(Float)):
        return False
    sizes = [complex(number.evalf()) for number in (target, gold)]
    largest = max(map(abs, sizes))
    return 0 < largest < 1e-2 and abs(sizes[0] - sizes[1]) > 1e-4 * largest


def _parse(text: str) -> Basic | None:
    """The expression that ``text`` is, not evaluated; None where it is none. Nothing is looked for inside of it."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units are off: math-verify would take the m of 6m for metres.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    kinds = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules)]
    text = re.sub(r"(?<=\d),(?=\d{3})", ", ", text)  # thousands have lost their commas: what is left separates
    parsed = parse(rf"\boxed{{{text}}}", kinds, fallback_mode="no_fallback", parsing_timeout=None)
    return parsed[0] if parsed else None


def _verify(target: Basic | None, gold: Basic | None) -> bool:
    """math-verify's comparison. Its own time-outs use SIGALRM and are off: the pool's are hard."""
    from math_verify import verify

    return target is not None and gold is not None and bool(verify([gold], [target], timeout_seconds=None))
