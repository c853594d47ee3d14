"""The generated tasks: right answers, wrong ones that fail, nothing of the test problems in training, and bad memories."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from pmpo_megatron.config import build
from pmpo_megatron.data import arithmetic, choices
from pmpo_megatron.data.generated import TASKS, make_problems
from pmpo_megatron.data.problems import Memory, Problem, is_held_out
from pmpo_megatron.data.prompts import DataConfig, load_prompts
from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.tiny_model import TinyModelConfig, make_tiny_model, make_tokenizer
from pmpo_megatron.rewards.choice import choice
from pmpo_megatron.rewards.code import CodeReward, check_sandbox
from pmpo_megatron.rewards.code_tests import last_program
from pmpo_megatron.rewards.config import CodeConfig


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_reproducible_and_held_out_ones_never_train(task):
    levels = TASKS[task].levels
    train, test = (make_problems(task, 600, levels=levels, seed=1, held_out=held_out) for held_out in (False, True))
    assert not {problem.text for problem in train} & {problem.text for problem in test}
    assert all(is_held_out(problem.text) for problem in test) and {problem.level for problem in train} == set(levels)
    assert make_problems(task, 20, levels=levels, seed=1) == train[:20] != make_problems(task, 20, levels=levels, seed=2)


def test_what_a_tiny_model_learns_of_all_tasks_is_the_text_also_after_it_is_loaded(tmp_path):
    config = TinyModelConfig(tasks={name: task.levels for name, task in TASKS.items()}, vocabulary=600, steps=0, layers=1)
    make_tiny_model(tmp_path / "model", config)
    memory, generator, tokenizer = Memory(0.9, 1.0), np.random.default_rng(0), load_tokenizer(str(tmp_path / "model"))
    assert len(tokenizer) == 600 and tokenizer.eos_token == "<end>"
    for task, most in (("arithmetic", 320), ("programs", 100), ("choices", 24)):
        for problem in make_problems(task, 100, levels=TASKS[task].levels, held_out=True):
            for text in (problem.text, TASKS[task].solve(problem, memory=memory, generator=generator)):
                ids = tokenizer.encode(text)
                assert tokenizer.decode(ids) == text and len(ids) <= most


def test_arithmetic_is_right():
    train, test = make_problems("arithmetic", 600, seed=1), make_problems("arithmetic", 300, seed=1, held_out=True)
    for problem in train + test:
        assert eval(problem.text[:-1]) == int(problem.answer)  # noqa: S307  our own text
    assert {p.level for p in train} == {1, 2, 3}
    assert make_problems("arithmetic", 20, seed=1) == train[:20] and make_problems("arithmetic", 20, seed=2) != train[:20]


def test_chains_are_worked_out_step_by_step():
    levels = (4, 6, 8)
    train, test = (
        make_problems("arithmetic", 300, levels=levels, seed=3),
        make_problems("arithmetic", 150, levels=levels, seed=3, held_out=True),
    )
    for problem in train + test:
        assert eval(problem.text[:-1]) == int(problem.answer)  # noqa: S307  our own text
        solution = arithmetic.solve(problem)
        assert solution.endswith(f" \\boxed{{{problem.answer}}}") and solution.count("(") == problem.level
        for step in solution.partition(" ")[0].split("(")[1:]:  # e.g. 7+5=12,1+2+1=4)42-11=
            columns, _, rest = step.partition(")")
            assert all(eval(left) == int(right) for left, right in (c.split("=") for c in columns.split(",")))  # noqa: S307
            assert eval(rest.rstrip("=")) == int(problem.answer)  # noqa: S307
    assert {p.level for p in train} == set(levels)
    assert all(80 < len(arithmetic.solve(p)) < 260 for p in train)
    assert arithmetic.solve(Problem("17+25-11=", "31", 4)) == "(7+5=12,1+2+1=4)42-11=(2-1=1,4-1=3)31 \\boxed{31}"


def test_a_bad_memory_mistakes_the_same_facts_for_the_same_results_at_rates_of_their_own():
    memory, generator = Memory(largest_rate=0.9, skew=8.0), np.random.default_rng(0)
    facts = [(f"{a}+{b}", a + b) for a in range(10) for b in range(10)]
    mistakes = lambda result: [result // 10 * 10 + (result + more) % 10 for more in range(1, 10)]  # noqa: E731
    rates = []
    for fact, result in facts:
        recalled = [memory.recall(fact, result, mistakes(result), generator) for _ in range(200)]
        wrong = {value for value in recalled if value != result}
        assert len(wrong) <= 1 and all(value // 10 == result // 10 and 0 <= value < 20 for value in wrong)
        rates.append(np.mean([value != result for value in recalled]))
    assert np.mean(rates) == pytest.approx(0.9 / 9, abs=0.05), "0.9 times the mean of u ** 8"
    assert max(rates) > 0.5 and np.median(rates) < 0.05
    assert all(Memory().recall(fact, result, mistakes(result), generator) == result for fact, result in facts)


MEANINGS = {  # of each phrase, of x and of the number in it; as a reader understands the words
    "add": lambda x, n: x + n,
    "subtract": lambda x, n: x - n,
    "subtract from": lambda x, n: n - x,
    "multiply by": lambda x, n: x * n,
    "divide by": lambda x, n: (x - x % n) // n,
    "remainder by": lambda x, n: next(r for r in range(n) if (x - r) % n == 0),
    "at least": lambda x, n: n if x < n else x,
    "at most": lambda x, n: n if x > n else x,
    "double": lambda x, n: x + x,
    "halve": lambda x, n: (x - (x & 1)) // 2,
    "negate": lambda x, n: 0 - x,
    "last digit": lambda x, n: next(d for d in range(10) if (x - d) % 10 == 0),
    "magnitude": lambda x, n: x if x > 0 else -x,
    "square": lambda x, n: x**2,
    "over": lambda x, n: x > n,
    "under": lambda x, n: x < n,
    "divisible by": lambda x, n: x // n * n == x,
    "even": lambda x, n: not x & 1,
    "odd": lambda x, n: bool(x & 1),
    "negative": lambda x, n: x < 0,
    "positive": lambda x, n: x > 0,
}


def understand(words, x):
    """What a phrase makes of ``x``; for a condition, whether it holds."""
    number = int(words.split()[-1]) if words[-1].isdigit() else None
    return MEANINGS[words if number is None else words.rpartition(" ")[0]](x, number)


def follow(text, x):
    """What the function that ``text`` describes returns."""
    for step in text.removeprefix("f: ").strip().split(", then "):
        times, condition = 1, None
        if step.startswith("if "):
            condition, _, step = step.removeprefix("if ").partition(", ")
        elif " times " in step:
            count, _, step = step.partition(" times ")
            times = int(count)
        for _ in range(times):
            x = understand(step, x) if condition is None or understand(condition, x) else x
    return x


def function(solution):
    space = {}
    exec(last_program(solution), space)  # noqa: S102  our own text
    return space["f"]


def passes(solution, problem):
    tests = problem.fields["tests"]
    return [function(solution)(*given) for given in tests["inputs"]] == tests["outputs"]


def test_tests_of_programs_are_what_the_words_say_and_tell_wrong_programs_apart():
    memory, generator, wrong = Memory(0.9, 0.5), np.random.default_rng(0), 0
    for problem in make_problems("programs", 600, levels=TASKS["programs"].levels):
        tests = problem.fields["tests"]
        assert tests["outputs"] == [follow(problem.text, x) for (x,) in tests["inputs"]], problem.text
        assert passes(problem.answer, problem) and problem.answer == TASKS["programs"].solve(problem)
        solution = TASKS["programs"].solve(problem, memory=memory, generator=generator)
        same = all(function(solution)(x) == follow(problem.text, x) for x in range(-300, 300))
        assert passes(solution, problem) is same, (problem.text, solution)
        wrong += not same
    assert wrong > 300


def test_the_reward_runs_references_and_their_mistakes():
    try:
        check_sandbox(CodeConfig())
    except ConfigError as error:
        pytest.skip(f"no sandbox here: {error}")
    memory, generator, reward = Memory(0.9, 0.5), np.random.default_rng(0), CodeReward(CodeConfig(wall_s=120.0))
    scores = []
    for problem in make_problems("programs", 20):
        mistaken = TASKS["programs"].solve(problem, memory=memory, generator=generator)
        assert reward(problem.answer, [problem.answer], problem.fields) == 1.0
        scores.append(reward(mistaken, [problem.answer], problem.fields))
        assert scores[-1] == float(passes(mistaken, problem))
    reward.close()
    assert 0.0 in scores


def test_exactly_one_choice_is_right():
    holds = {}  # question -> things of which it is true, from the tables read the other way
    for kind, things in choices.KINDS.items():
        of_class = next(name for name, kinds in choices.CLASSES.items() if kind in kinds)
        asked = [f"Which is a {kind}?", *(f"Which has {part}?" for part, owner in choices.HAS.items() if owner == kind)]
        asked += [f"Which {does}?" for does, who in choices.DOES.items() if who == of_class]
        for question in asked:
            holds.setdefault(question, set()).update(things)
    memory, generator, scores = Memory(0.9, 0.5), np.random.default_rng(0), []
    for problem in make_problems("choices", 600):
        question, options = problem.text.partition("?")[0] + "?", problem.fields["options"]
        [right] = [letter for letter, option in zip("ABCD", options, strict=True) if option in holds[question]]
        assert (
            right == problem.answer
            and problem.text == f"{question} A {options[0]} B {options[1]} C {options[2]} D {options[3]}\n"
        )
        solution = choices.solve(problem)
        scored = {letter: choice(f"{solution[:-2]}{letter}}}", [problem.answer], problem.fields) for letter in "ABCD"}
        assert choice(solution, [problem.answer], problem.fields) == 1.0 and scored == {x: float(x == right) for x in "ABCD"}
        mistaken = choices.solve(problem, memory=memory, generator=generator)
        scores.append(choice(mistaken, [problem.answer], problem.fields))
    assert 0.25 < np.mean(scores) < 0.75
    assert len(holds) == sum(map(len, (choices.KINDS, choices.HAS, choices.DOES)))
    assert not any(set(one) & set(other) for one, other in itertools.combinations(choices.KINDS.values(), 2))


def test_generated_sources_bring_what_their_rewards_need():
    own = {"programs": {"levels": [2, 4]}, "choices": {"levels": [3]}}
    sources = {name: {"source": name, "problems": 4, **own.get(name, {})} for name in TASKS}
    prompts = load_prompts(build(DataConfig, {"max_prompt_tokens": 200, "sources": sources}), make_tokenizer()).prompts
    assert [prompt.source for prompt in prompts] == [name for name in TASKS for _ in range(4)]
    programs, questions = prompts[4:8], prompts[8:]
    assert [prompt.metadata["level"] for prompt in programs] == [2, 4, 2, 4]
    assert all(prompt.answers[0].startswith("```\ndef f(x):") and prompt.metadata["tests"]["inputs"] for prompt in programs)
    assert all(prompt.answers[0] in "ABCD" and len(prompt.metadata["options"]) == 4 for prompt in questions)
    for name, levels in (("programs", [5]), ("choices", [0]), ("choices", [])):
        with pytest.raises(ConfigError, match=rf"levels: .*the levels of {name} are 1 to"):
            DataConfig(source=name, levels=tuple(levels))


def test_steps_that_are_left_to_a_calculator_are_right_whatever_is_remembered():
    rng, worst = np.random.default_rng(0), Memory(largest_rate=1.0, skew=0.0)
    always = dict(memory=replace(worst, call_rate=1.0), generator=rng)
    assert arithmetic.solve(Problem("17+25-11=", "31", 4), **always) == "?42-11=?31 \\boxed{31}"
    for problem in make_problems("arithmetic", 50, levels=(5,), seed=1):
        solution = arithmetic.solve(problem, **always)
        assert solution.endswith(f"\\boxed{{{problem.answer}}}") and solution.count("?") == problem.level
    sometimes, problems = replace(worst, call_rate=0.25), make_problems("arithmetic", 200, levels=(5,), seed=2)
    mixed = "".join(arithmetic.solve(problem, memory=sometimes, generator=rng) for problem in problems)
    assert 150 < mixed.count("?") < 350 and mixed.count("?") + mixed.count("(") == 1000
