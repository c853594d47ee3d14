"""The generated tasks by name: problems for training and held-out ones, which never overlap, and worked solutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pmpo_megatron.data import arithmetic, choices, programs
from pmpo_megatron.data.problems import Problem, is_held_out


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        skew: of a `Memory` with which a minority of the problems is solved; the more facts a problem takes, the larger.
    """

    levels: tuple[int, ...]
    skew: float
    draw: Callable[[int, np.random.Generator], Problem]
    solve: Callable[..., str]  # (problem, memory=, generator=)


TASKS = {
    name: Task(module.LEVELS, module.SKEW, module.draw, module.solve)
    for name, module in (("arithmetic", arithmetic), ("programs", programs), ("choices", choices))
}


def make_problems(
    task: str, count: int, *, levels: tuple[int, ...] = (1, 2, 3), seed: int = 0, held_out: bool = False
) -> list[Problem]:
    """``count`` problems, the levels taken in turn; problems may repeat where a level has few."""
    generator = np.random.default_rng([seed, int(held_out)])
    problems: list[Problem] = []
    while len(problems) < count:
        problem = TASKS[task].draw(levels[len(problems) % len(levels)], generator)
        if is_held_out(problem.text) == held_out:
            problems.append(problem)
    return problems
