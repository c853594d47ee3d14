"""A generated task: arithmetic with difficulty levels, for the quickstart, tests and ablations.

Level 1 adds and subtracts one-digit numbers, level 2 two-digit numbers, level 3 adds three numbers. Training and held-out
problems never overlap: a problem is held out where a hash of its text says so, which needs no bookkeeping.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

LEVELS = (1, 2, 3)
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Problem:
    """``text`` ends where the solution begins, e.g. ``17+25=``; ``answer`` is the number as text."""

    text: str
    answer: str
    level: int


def is_held_out(text: str) -> bool:
    """Whether the problem belongs to the held-out share; depends on the text alone."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def make_problems(count: int, *, levels: tuple[int, ...] = LEVELS, seed: int = 0, held_out: bool = False) -> list[Problem]:
    """``count`` problems, the levels taken in turn; problems may repeat where a level has few."""
    generator = np.random.default_rng([seed, int(held_out)])
    problems: list[Problem] = []
    while len(problems) < count:
        problem = _draw(levels[len(problems) % len(levels)], generator)
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


def solve(problem: Problem, *, slip_rate: float = 0.0, generator: np.random.Generator | None = None) -> str:
    """A solution of ``problem``: column by column from the right, carries and borrows included, the answer boxed.

    ``17+25=`` gives ``7+5=12,1+2+1=4 \\boxed{42}``. With probability ``slip_rate`` a column's result is a random number
    instead, as of somebody careless, and what follows goes on from it.
    """
    subtract = "-" in problem.text
    numbers = [int(number) for number in problem.text.rstrip("=").replace("-", "+").split("+")]
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
        if slip_rate and generator is not None and generator.random() < slip_rate:
            result = int(generator.integers(0, 10))
        if not subtract:
            carry = result // 10
        columns.append(("-" if subtract else "+").join(map(str, digits)) + f"={result}")
        last = place * 10 > max(numbers)
        answer += place * (result if last else result % 10)
    return ",".join(columns) + f" \\boxed{{{answer}}}"
