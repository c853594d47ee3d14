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
    """``text`` ends where the solution begins, e.g. ``17+25=``; ``answer`` is the number as text.

    ``solution`` works column by column from the right, carries and borrows included, and ends with the boxed answer:
    ``7+5=12,1+2+1=4 \\boxed{42}``.
    """

    text: str
    answer: str
    level: int
    solution: str


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
        return Problem(f"{a}-{b}=", str(a - b), level, _written_out(_differences(a, b), a - b))
    return Problem("+".join(map(str, numbers)) + "=", str(sum(numbers)), level, _written_out(_sums(numbers), sum(numbers)))


def _sums(numbers: list[int]) -> list[str]:
    columns, carry, place = [], 0, 1
    while place == 1 or place <= max(numbers):
        digits = [number // place % 10 for number in numbers if place == 1 or number >= place]
        terms = digits + ([carry] if carry else [])
        columns.append("+".join(map(str, terms)) + f"={sum(terms)}")
        carry, place = sum(terms) // 10, place * 10
    return columns


def _differences(a: int, b: int) -> list[str]:
    columns: list[str] = []
    while not columns or a:
        digit, minus = a % 10, b % 10
        borrow = digit < minus
        columns.append(f"{digit + 10 * borrow}-{minus}={digit + 10 * borrow - minus}")
        a, b = a // 10 - borrow, b // 10
    return columns


def _written_out(columns: list[str], answer: int) -> str:
    return ",".join(columns) + f" \\boxed{{{answer}}}"
