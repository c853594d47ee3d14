"""A generated task: arithmetic with difficulty levels, for the quickstart, tests and studies of objectives.

Level 1 adds and subtracts one-digit numbers, level 2 two-digit numbers, level 3 adds three numbers. Level n from 4 to 8 is a
chain of n dependent operations, worked out in about 26 characters each.
"""

from __future__ import annotations

import re

import numpy as np

from pmpo_megatron.data.problems import PERFECT, Memory, Problem

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8)
SKEW = 6.0  # a problem of four operations takes about 14 facts
SHORT_LEVELS = (1, 2, 3)


def draw(level: int, generator: np.random.Generator) -> Problem:
    """A problem such as ``17+25=``; the answer is the number as text."""
    return _draw_short(level, generator) if level in SHORT_LEVELS else _draw_chain(level, generator)


def _draw_short(level: int, generator: np.random.Generator) -> Problem:
    low, high = (0, 9) if level == 1 else (10, 99) if level == 2 else (1, 49)
    numbers = generator.integers(low, high + 1, size=3 if level == 3 else 2).tolist()
    if level < 3 and generator.random() < 0.5:
        a, b = sorted(numbers, reverse=True)
        return Problem(f"{a}-{b}=", str(a - b), level)
    return Problem("+".join(map(str, numbers)) + "=", str(sum(numbers)), level)


def _draw_chain(level: int, generator: np.random.Generator) -> Problem:
    """``level`` operations on two-digit numbers, all intermediate results of two digits as well."""
    value = int(generator.integers(10, 100))
    text = str(value)
    for _ in range(level):
        add = value < 20 or (value < 90 and generator.random() < 0.5)
        number = int(generator.integers(10, (99 - value if add else value - 10) + 1))
        value += number if add else -number
        text += f"{'+' if add else '-'}{number}"
    return Problem(text + "=", str(value), level)


def solve(problem: Problem, *, memory: Memory = PERFECT, generator: np.random.Generator | None = None) -> str:
    """A solution of ``problem``: column by column from the right, carries and borrows included, the answer boxed.

    ``17+25=`` gives ``7+5=12,1+2+1=4 \\boxed{42}``, and a chain such as ``17+25-11=`` goes on with what is left of it:
    ``(7+5=12,1+2+1=4)42-11=(2-1=1,4-1=3)31 \\boxed{31}``. What ``memory`` has wrong is written as it is recalled, and
        what follows goes on from it. So often as its ``call_rate`` says, a step of a chain is not worked out but left to a
    calculator, which is never wrong, by a question mark: ``?42-11=``.
    """
    rest = problem.text.rstrip("=")
    if problem.level in SHORT_LEVELS:
        columns, answer = _columns(rest, memory, generator)
        return f"{columns} \\boxed{{{answer}}}"
    text = ""
    while match := re.match(r"\d+[+-]\d+", rest):
        called = memory.asks(generator)
        columns, value = _columns(match[0], PERFECT if called else memory, generator)
        rest = f"{value}{rest[match.end() :]}"
        text += ("?" if called else f"({columns})") + f"{rest}="
    return f"{text[:-1]} \\boxed{{{rest}}}"


def _columns(expression: str, memory: Memory, generator: np.random.Generator | None) -> tuple[str, int]:
    """(the columns written out, their result) of a sum of up to three numbers or a difference of two."""
    subtract = "-" in expression
    numbers = [int(number) for number in re.split("[+-]", expression)]
    columns, answer, carry = [], 0, 0
    for place in (1, 10)[: len(str(max(numbers)))]:
        digits = [number // place % 10 for number in numbers if place == 1 or number >= place]
        if subtract:
            digits = [digits[0] - carry, *digits[1:]]
            carry = int(digits[0] < sum(digits[1:]))
            digits[0] += 10 * carry
            result = digits[0] - sum(digits[1:])
        else:
            digits += [carry] if carry else []
            result = sum(digits)
        fact = ("-" if subtract else "+").join(map(str, digits))
        mistakes = [result // 10 * 10 + (result + more) % 10 for more in range(1, 10)]
        result = memory.recall(fact, result, mistakes, generator)
        if not subtract:
            carry = result // 10
        columns.append(f"{fact}={result}")
        last = place * 10 > max(numbers)
        answer += place * (result if last else result % 10)
    return ",".join(columns), answer
