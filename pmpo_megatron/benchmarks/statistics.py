"""Accuracy over a benchmark's problems, with standard errors that treat the problems as the sample.

Responses to one problem are not independent of each other, the problems are: so every figure is first one number per
problem, and its standard error is that of a mean over problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pmpo_megatron.rewards.scorer import CORRECT


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; NaN where one problem is too few to say."""

    value: float
    error: float

    def percent(self) -> str:
        """``46.7 ± 1.9``."""
        error = "" if math.isnan(self.error) else f" ± {100 * self.error:.1f}"
        return f"{100 * self.value:.1f}{error}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value per problem, and its standard error s / sqrt(P) with the sample deviation s over P problems.

    Raises:
        ValueError: ``values`` is empty.
    """
    count = len(values)
    if not count:
        raise ValueError("no problems")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Estimate(mean, math.sqrt(squares / (count - 1) / count))


def accuracy(scores: Sequence[Sequence[float]]) -> Estimate:
    """avg@n: the share of correct ones among each problem's n responses, over problems; equal to pass@1."""
    return estimate([sum(score >= CORRECT for score in each) / len(each) for each in scores])


def pass_at_k(scores: Sequence[Sequence[float]], k: int) -> Estimate:
    """pass@k over problems: the probability that one of k responses is correct.

    Raises:
        ValueError: a problem has fewer than ``k`` responses.
    """
    return estimate([pass_probability(len(each), sum(score >= CORRECT for score in each), k) for each in scores])


def pass_probability(samples: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), without bias for any n >= k (Chen et al., 2107.03374, eq. 1).

    C(n - c, k) / C(n, k) = prod_{i=n-c+1}^{n} (1 - k / i), a product that neither overflows nor cancels.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {samples} responses with {correct} correct ones does not exist")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over benchmarks, each with the same weight; their errors are independent, so their squares add up."""
    count = len(estimates)
    return Estimate(
        math.fsum(each.value for each in estimates) / count,
        math.sqrt(math.fsum(each.error**2 for each in estimates)) / count,
    )


def default_ks(samples: int) -> tuple[int, ...]:
    """Powers of two below ``samples``, and ``samples``: the k for which pass@k is shown. None for a single response."""
    return tuple(k for k in (2**i for i in range(1, 20)) if k < samples) + ((samples,) if samples > 1 else ())
