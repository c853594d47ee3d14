"""How a worker calls a reward function: one call at a time, or asynchronous ones many at once, retried."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pmpo_megatron.rewards.process import Score

FIRST_PAUSE_S = 0.25  # before the second attempt; doubles with each
Call = tuple[str | list[str], list[str], dict[str, Any]]  # response or responses, accepted answers, metadata


def time_limit(calls: int, timeout: float, concurrency: int, attempts: int) -> float:
    """Seconds after which ``calls`` of an asynchronous function are over, however often they fail.

    Calls that begin as soon as one of ``concurrency`` places is free end by (their times together) / places + (the longest
    chain of attempts); see R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969.
    """
    pauses = FIRST_PAUSE_S * (2**attempts - 1)
    return attempts * timeout * (calls / concurrency + 1) + pauses + timeout


def call_once(function: Callable[..., Any], call: Call) -> Score:
    """The score of one call, or what it raised."""
    try:
        return as_score(function(*call))
    except Exception as error:  # math-verify and sympy raise anything; the item scores 0 and is counted
        return describe_error(error)


def as_score(value: Any) -> Score:
    """What a function returned, as JSON has it: a number, or a list of them for a group."""
    if hasattr(value, "tolist"):
        value = value.tolist()  # an array
    return [float(each) for each in value] if isinstance(value, (list, tuple)) else float(value)


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


async def call_all(
    function: Callable[..., Awaitable[Any]], calls: Sequence[Call], *, timeout: float, concurrency: int, attempts: int
) -> tuple[list[Score], int, int]:
    """Every call's score or error, how many attempts were repetitions, and how many calls took too long every time.

    A place among the ``concurrency`` is free while a call waits for its next attempt.
    """
    places = asyncio.Semaphore(concurrency)
    retries = timeouts = 0

    async def one(call: Call) -> Score:
        nonlocal retries, timeouts
        for attempt in range(attempts):
            if attempt:
                retries += 1
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                async with places, asyncio.timeout(timeout) as clock:
                    return as_score(await function(*call))
            except Exception as error:  # a judge's client raises its own library's errors
                failure, too_late = describe_error(error), clock.expired()
        timeouts += too_late
        return [0.0] * len(call[0]) if too_late and isinstance(call[0], list) else 0.0 if too_late else failure

    return await asyncio.gather(*map(one, calls)), retries, timeouts
