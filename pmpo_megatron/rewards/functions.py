"""Reward functions: (response, accepted answers) -> float in [0, 1]. They run in workers and may take as long as they like."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards.equality import same_answer
from pmpo_megatron.rewards.extraction import boxed_answers, extract_answer

RewardFunction = Callable[[str, Sequence[str]], float]


def math(response: str, answers: Sequence[str], *, evaluated: bool = True) -> float:
    """1.0 if the response's final answer equals one of ``answers``, by spelling or by math-verify; else 0.0.

    Args:
        evaluated: an expression that is still to be evaluated, such as 17+25, is accepted only where the answer is one.
    """
    final = extract_answer(response)
    return float(final is not None and any(same_answer(final, answer, evaluated=evaluated) for answer in answers))


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
        ConfigError: there is no such function, or it cannot be called with a response and its answers.
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
    _check_signature(name, function)
    return function


def _check_signature(name: str, function: RewardFunction) -> None:
    try:
        inspect.signature(function).bind("response", ["answer"])
    except TypeError as error:
        wanted = "a function of (response, answers)"
        raise ConfigError("rewards.functions", f"{name!r} must be {wanted}, called with two arguments: {error}") from None
    except ValueError:
        pass  # written in C, without a signature that could be read
