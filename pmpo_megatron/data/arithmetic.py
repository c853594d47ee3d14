"""A generated task: arithmetic with difficulty levels, for the quickstart, tests and studies of objectives.

Level 1 adds and subtracts one-digit numbers, level 2 two-digit numbers, level 3 adds three numbers. Level n from 4 to 8 is a
chain of n dependent operations, worked out in about 26 characters each. Training and held-out problems never overlap: a
problem is held out where a hash of its text says so, which needs no bookkeeping.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8)
SHORT_LEVELS = (1, 2, 3)
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Problem:
    """``text`` ends where the solution begins, e.g. ``17+25=``; ``answer`` is the number as text."""

    text: str
    answer: str
    level: int


@dataclass(frozen=True)
class Memory:
    """Somebody's memory of sums and differences of digits, some of them wrong.

    Every fact, such as ``7+8``, has a wrong result of its own, and is recalled wrongly with a rate of its own. The rates are
    ``largest_rate * u ** skew`` with u uniform in [0, 1]: most facts are nearly certain, some are more often wrong than right.
    """

    largest_rate: float = 0.0
    skew: float = 6.0
    seed: int = 0

    def recall(self, fact: str, result: int, generator: np.random.Generator | None) -> int:
        """``result`` of ``fact``, or what it is mistaken for."""
        if generator is None or not self.largest_rate:
            return result
        digest = hashlib.sha256(f"{self.seed} {fact}".encode()).digest()
        rate = self.largest_rate * (int.from_bytes(digest[:4]) / 2**32) ** self.skew
        return (result + 1 + digest[4] % 9) % 10 + result // 10 * 10 if generator.random() < rate else result


def is_held_out(text: str) -> bool:
    """Whether the problem belongs to the held-out share; depends on the text alone."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def make_problems(
    count: int, *, levels: tuple[int, ...] = SHORT_LEVELS, seed: int = 0, held_out: bool = False
) -> list[Problem]:
    """``count`` problems, the levels taken in turn; problems may repeat where a level has few."""
    generator = np.random.default_rng([seed, int(held_out)])
    problems: list[Problem] = []
    while len(problems) < count:
        level = levels[len(problems) % len(levels)]
        problem = _draw(level, generator) if level in SHORT_LEVELS else _draw_chain(level, generator)
        if is_held_out(problem.text) == held_out:
            problems.append(problem)
    return problems


def _draw(level: int, generator: np.random.Generator) -> Problem:
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


def solve(
    problem: Problem,
    *,
    memory: Memory = Memory(),
    generator: np.random.Generator | None = None,
    call_rate: float = 0.0,
) -> str:
    """A solution of ``problem``: column by column from the right, carries and borrows included, the answer boxed.

    ``17+25=`` gives ``7+5=12,1+2+1=4 \\boxed{42}``, and a chain such as ``17+25-11=`` goes on with what is left of it:
    ``(7+5=12,1+2+1=4)42-11=(2-1=1,4-1=3)31 \\boxed{31}``. What ``memory`` has wrong is written as it is recalled, and
    what follows goes on from it. So often as ``call_rate`` says, a step of a chain is not worked out but left to a
    calculator, which is never wrong, by a question mark: ``?42-11=``.
    """
    rest = problem.text.rstrip("=")
    if problem.level in SHORT_LEVELS:
        columns, answer = _columns(rest, memory, generator)
        return f"{columns} \\boxed{{{answer}}}"
    text = ""
    while match := re.match(r"\d+[+-]\d+", rest):
        called = bool(generator is not None and call_rate and generator.random() < call_rate)
        columns, value = _columns(match[0], Memory() if called else memory, generator)
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
        result = memory.recall(fact, result, generator)
        if not subtract:
            carry = result // 10
        columns.append(f"{fact}={result}")
        last = place * 10 > max(numbers)
        answer += place * (result if last else result % 10)
    return ",".join(columns), answer
