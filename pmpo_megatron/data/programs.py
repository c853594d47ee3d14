"""A generated task: small Python functions of one number, described in words, verified by running them (reward `code`).

A problem of level n describes n steps, such as ``f: double, then if even, add 3, then 2 times negate``: plain, under
a condition, or repeated. Solutions are blocks of code; a problem's tests are calls with the values that its reference returns.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from pmpo_megatron.data.problems import PERFECT, Memory, Problem

LEVELS = (1, 2, 3, 4)
SKEW = 2.0  # a problem takes about 4 facts
OPERATIONS = {
    "add {n}": "x+{n}",
    "subtract {n}": "x-{n}",
    "subtract from {n}": "{n}-x",
    "multiply by {n}": "x*{n}",
    "divide by {n}": "x//{n}",
    "remainder by {n}": "x%{n}",
    "at least {n}": "max(x,{n})",
    "at most {n}": "min(x,{n})",
    "double": "x*2",
    "halve": "x//2",
    "negate": "-x",
    "last digit": "x%10",
    "magnitude": "abs(x)",
    "square": "x*x",
}
CONDITIONS = {
    "over {n}": "x>{n}",
    "under {n}": "x<{n}",
    "divisible by {n}": "x%{n}==0",
    "even": "x%2==0",
    "odd": "x%2==1",
    "negative": "x<0",
    "positive": "x>0",
}
STEP = re.compile(r"(?:if (?P<condition>.+?), |(?P<times>\d) times )?(?P<operation>.+)")
INPUTS = (-100, -13, -10, -7, -4, -3, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 16, 18, 27, 50, 64, 99, 101)


def draw(level: int, generator: np.random.Generator) -> Problem:
    """A description of ``level`` steps; its answer is the reference solution."""
    text = "f: " + ", then ".join(_draw_step(generator) for _ in range(level)) + "\n"
    answer = solve(Problem(text, "", level))
    space: dict[str, Any] = {}
    exec(answer.strip("`"), space)  # our own text: the reference solution
    tests = {"fn_name": "f", "inputs": [[x] for x in INPUTS], "outputs": [space["f"](x) for x in INPUTS]}
    return Problem(text, answer, level, {"tests": tests})


def _draw_step(generator: np.random.Generator) -> str:
    """Squares are not repeated: their results would have thousands of digits."""
    kind = ("plain", "if", "times")[int(generator.integers(3))]
    phrases = [phrase for phrase in OPERATIONS if kind != "times" or phrase != "square"]
    step = phrases[int(generator.integers(len(phrases)))].format(n=generator.integers(2, 10))
    if kind == "plain":
        return step
    if kind == "times":
        return f"{generator.integers(2, 5)} times {step}"
    condition = list(CONDITIONS)[int(generator.integers(len(CONDITIONS)))]
    return f"if {condition.format(n=generator.integers(2, 10))}, {step}"


def solve(problem: Problem, *, memory: Memory = PERFECT, generator: np.random.Generator | None = None) -> str:
    """A block of code that does what ``problem`` says, or what its phrases are mistaken for; in each kind of step anew."""
    lines = ""
    for step in problem.text.removeprefix("f: ").rstrip("\n").split(", then "):
        match = STEP.fullmatch(step)
        assert match is not None, step
        kind = "if" if match["condition"] else "times" if match["times"] else "plain"
        assignment = f"x = {_expression(kind, match['operation'], OPERATIONS, memory, generator)}\n"
        if match["condition"]:
            lines += f"    if {_expression(kind, match['condition'], CONDITIONS, memory, generator)}:\n    "
        elif match["times"]:
            lines += f"    for i in range({match['times']}):\n    "
        lines += f"    {assignment}"
    return f"```\ndef f(x):\n{lines}    return x\n```"


def _expression(kind: str, words: str, table: dict[str, str], memory: Memory, generator: np.random.Generator | None) -> str:
    """What ``words`` mean in Python; they may be mistaken for a phrase that takes as many numbers."""
    number = re.search(r"\d", words)
    phrase = words.replace(number[0], "{n}") if number else words
    alike = [other for name, other in table.items() if ("{n}" in name) == bool(number) and name != phrase]
    recalled = memory.recall(f"{kind} {phrase}", table[phrase], alike, generator)
    return recalled.format(n=number[0] if number else "")
