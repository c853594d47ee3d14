"""What the generated tasks share: problems, which of them are held out, and a memory of facts some of which are wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

HELD_OUT_SHARE = 0.2
Result = TypeVar("Result")


@dataclass(frozen=True)
class Problem:
    """``text`` ends where the solution begins; ``fields`` are what its reward needs beside ``answer``: tests, or options."""

    text: str
    answer: str
    level: int
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Somebody's memory of facts, such as sums of digits, some of them wrong.

    Every fact, such as ``7+8``, has a wrong result of its own, and is recalled wrongly with a rate of its own. The rates are
    ``largest_rate * u ** skew`` with u uniform in [0, 1]: most facts are nearly certain, some are more often wrong than right.
    """

    largest_rate: float = 0.0
    skew: float = 6.0
    seed: int = 0
    call_rate: float = 0.0  # of steps that are asked of somebody else instead

    def recall(self, fact: str, result: Result, wrong: Sequence[Result], generator: np.random.Generator | None) -> Result:
        """``result`` of ``fact``, or the one among ``wrong`` that it is mistaken for; without ``generator`` no mistake."""
        if generator is None or not self.largest_rate:
            return result
        digest = hashlib.sha256(f"{self.seed} {fact}".encode()).digest()
        rate = self.largest_rate * (int.from_bytes(digest[:4]) / 2**32) ** self.skew
        return wrong[digest[4] % len(wrong)] if generator.random() < rate else result

    def asks(self, generator: np.random.Generator | None) -> bool:
        """Whether the next step is asked of somebody else; never without ``generator``."""
        return bool(generator is not None and self.call_rate and generator.random() < self.call_rate)


PERFECT = Memory()


def is_held_out(text: str) -> bool:
    """Whether the problem belongs to the held-out share; depends on the text alone, so that no bookkeeping is needed."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_SHARE
