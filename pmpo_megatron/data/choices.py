"""A generated task: questions about a small world, with four things to choose from (reward `choice`).

Facts say of what kind a thing is, rules what a kind has and to which class it belongs. Level 1 asks for a kind (one fact for
each thing), level 2 for what a kind has (a rule more), level 3 for what a class does (two rules more).
"""

from __future__ import annotations

import numpy as np

from pmpo_megatron.data.problems import PERFECT, Memory, Problem

LEVELS = (1, 2, 3)
SKEW = 0.8  # a problem takes about 4 facts, and a guess is right once in four times
LETTERS = "ABCD"
QUESTIONS = {1: "Which is a ", 2: "Which has ", 3: "Which "}
KINDS = {
    "bird": ("robin", "eagle", "crow", "swan"),
    "fish": ("trout", "salmon", "herring", "cod"),
    "insect": ("beetle", "wasp", "moth", "cricket"),
    "tree": ("oak", "pine", "birch", "maple"),
    "herb": ("basil", "mint", "thyme", "sage"),
    "tool": ("hammer", "saw", "drill", "wrench"),
    "vehicle": ("truck", "tram", "bicycle", "van"),
    "cloth": ("silk", "wool", "linen", "velvet"),
}
HAS = {
    "feathers": "bird",
    "a beak": "bird",
    "gills": "fish",
    "fins": "fish",
    "six legs": "insect",
    "feelers": "insect",
    "bark": "tree",
    "a trunk": "tree",
    "scent": "herb",
    "flavour": "herb",
    "a handle": "tool",
    "a task": "tool",
    "wheels": "vehicle",
    "a driver": "vehicle",
    "threads": "cloth",
    "folds": "cloth",
}
CLASSES = {
    "animal": ("bird", "fish", "insect"),
    "plant": ("tree", "herb"),
    "product": ("tool", "vehicle", "cloth"),
}
DOES = {
    "eats": "animal",
    "breathes": "animal",
    "has roots": "plant",
    "needs light": "plant",
    "was made": "product",
    "is sold": "product",
}
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
CLASS_OF = {kind: name for name, kinds in CLASSES.items() for kind in kinds}


def draw(level: int, generator: np.random.Generator) -> Problem:
    """A question such as ``Which has feathers? A trout B robin C oak D saw``, to which one letter is the answer."""
    asked = [*KINDS] if level == 1 else [*HAS] if level == 2 else [*DOES]
    term = asked[int(generator.integers(len(asked)))]
    wanted = term if level == 1 else HAS[term] if level == 2 else DOES[term]
    suits = {thing: wanted in (kind, CLASS_OF[kind]) for thing, kind in KIND_OF.items()}
    right = [str(generator.choice([thing for thing in suits if suits[thing]]))]
    others = generator.choice([thing for thing in suits if not suits[thing]], size=3, replace=False).tolist()
    options = [str(thing) for thing in generator.permutation(right + others)]
    listed = " ".join(f"{letter} {thing}" for letter, thing in zip(LETTERS, options, strict=True))
    answer = LETTERS[options.index(right[0])]
    return Problem(f"{QUESTIONS[level]}{term}? {listed}\n", answer, level, {"options": options})


def solve(problem: Problem, *, memory: Memory = PERFECT, generator: np.random.Generator | None = None) -> str:
    """What is asked for, then thing after thing until one suits: ``feathers bird; trout fish; robin bird \\boxed{B}``.

    What ``memory`` has wrong is written as it is recalled; if nothing suits the last letter is taken.
    """

    def recall(name: str, table: dict[str, str]) -> str:
        others = [other for other in dict.fromkeys(table.values()) if other != table[name]]
        return memory.recall(name, table[name], others, generator)

    term = problem.text.removeprefix(QUESTIONS[problem.level]).partition("?")[0]
    wanted, text = term, ""
    if problem.level > 1:
        wanted = recall(term, HAS if problem.level == 2 else DOES)
        text = f" {term} {wanted};"
    for letter, thing in zip(LETTERS, problem.fields["options"], strict=True):
        name = recall(thing, KIND_OF)
        text += f" {thing} {name}"
        if problem.level == 3:
            name = recall(name, CLASS_OF)
            text += f" {name}"
        if name == wanted or letter == LETTERS[-1]:
            break
        text += ";"
    return f"{text} \\boxed{{{letter}}}"
