"""How long each phase of a step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Seconds of each phase since the last `take`. One thread only.

    A phase inside another pauses the outer one, so phases never overlap and add up to at most the total.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._mark = self._taken = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the ``with`` block, also where it raises, as phase ``name``."""
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def take(self) -> dict[str, float]:
        """``time/<phase>_s`` of every phase, and ``time/total_s``, since the last `take`; starts anew."""
        self._switch()
        now = self._mark
        result = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        result["time/total_s"] = now - self._taken
        self._seconds, self._taken = {}, now
        return result

    def _switch(self) -> None:
        """Gives the time since the last switch to the phase that was running."""
        now = self._clock()
        if self._stack:
            name = self._stack[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now
