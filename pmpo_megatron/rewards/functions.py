"""Reward functions, run by workers (`RewardPool`): (response, accepted answers[, metadata]) -> any finite float.

One whose first parameter is called ``responses`` scores a group: (responses to one prompt, answers[, metadata]) -> list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pmpo_megatron.config import import_named
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards.choice import choice
from pmpo_megatron.rewards.code import CodeReward, check_sandbox
from pmpo_megatron.rewards.config import CodeConfig
from pmpo_megatron.rewards.equality import same_answer
from pmpo_megatron.rewards.extraction import boxed_answers, extract_answer

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """How a function is to be called: with the row's metadata, with a whole group's responses, or awaited."""

    metadata: bool
    group: bool = False
    asynchronous: bool = False


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


CODE = "code"  # made with its settings, in each worker
BUILT_IN: dict[str, Callable[..., float]] = {"math": math, "boxed": boxed, "exact": exact, "choice": choice}


def check_functions(names: Iterable[str], code: CodeConfig) -> dict[str, Kind]:
    """Checks that every function exists and can be called, and for `code` that its sandbox works here.

    Returns:
        How each is to be called.

    Raises:
        ConfigError: a function is missing or of another signature, or there is no sandbox.
    """
    kinds = {name: kind_of(name) for name in names}
    if CODE in kinds:
        check_sandbox(code)
    return kinds


def kind_of(name: str) -> Kind:
    """How the function ``name`` is to be called.

    Raises:
        ConfigError: it is missing or of another signature.
    """
    if name == CODE:
        return Kind(metadata=True)
    function = _find(name)
    metadata = _takes_metadata(name, function)
    try:
        group = next(iter(inspect.signature(function).parameters)) == "responses"
    except ValueError:
        group = False  # written in C, without a signature that could be read
    asynchronous = any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004
    return Kind(metadata, group, asynchronous)


def make_function(name: str, *, evaluated: bool, code: CodeConfig) -> RewardFunction:
    """The function as a worker calls it, with (response, answers, metadata) whether or not it takes the last."""
    if name == CODE:
        return CodeReward(code)
    function = _find(name)
    if _takes_metadata(name, function):
        return function
    if name == "math":
        function = partial(math, evaluated=evaluated)
    return lambda response, answers, metadata: function(response, answers)


def _find(name: str) -> Callable[..., float]:
    """A built-in function, or what ``package.module:name`` imports."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, _ = name.partition(":")
    if module == "__main__":
        raise ConfigError("rewards.functions", f"{name!r}: workers import functions, and __main__ is not a module of theirs")
    if not colon:
        known = ", ".join((*BUILT_IN, CODE))
        raise ConfigError("rewards.functions", f"{name!r} is none of {known}, nor of the form package.module:name")
    function = import_named("rewards.functions", name)
    if not callable(function):
        raise ConfigError("rewards.functions", f"{name!r} is a {type(function).__name__}, not a function")
    return function


def _takes_metadata(name: str, function: Callable[..., float]) -> bool:
    """Whether ``function`` is to be called with metadata: if it has a parameter of that name, or needs a third one."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return False  # written in C, without a signature that could be read
    arguments: list[Any] = ["response", ["answer"]]
    try:
        if "metadata" not in signature.parameters:
            signature.bind(*arguments)
            return False
    except TypeError:
        pass
    try:
        signature.bind(*arguments, {})
    except TypeError as error:
        wanted = "a function of (response, answers) or (response, answers, metadata), or of responses in its place"
        raise ConfigError("rewards.functions", f"{name!r} must be {wanted}: {error}") from None
    return True
