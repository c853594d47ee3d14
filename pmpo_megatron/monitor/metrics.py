"""Metrics that carry what they are: a sum, a mean with its denominator, a maximum, the values of a distribution.

`summarize` turns them into the numbers to log.

Shape legend: N values, as many as there are trajectories or tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Metric(ABC):
    """The value of one quantity. Frozen."""

    @abstractmethod
    def summary(self, name: str) -> dict[str, float]:
        """The numbers to log, by their full names; none where the metric covers nothing."""


@dataclass(frozen=True)
class Sum(Metric):
    """Adds up: tokens, skipped steps, time-outs."""

    value: float

    def summary(self, name: str) -> dict[str, float]:
        return {name: float(self.value)}


@dataclass(frozen=True)
class Mean(Metric):
    """A mean with its denominator: ``total / count``. A weighted mean has sum(w*x) and sum(w) in their places."""

    total: float
    count: float

    @staticmethod
    def of(values_N: Sequence[float] | np.ndarray, weights_N: Sequence[float] | np.ndarray | None = None) -> Mean:
        """Mean of ``values_N``, weighted by ``weights_N`` (>= 0, same length) where given."""
        values_N = np.asarray(values_N, dtype=np.float64)
        weights_N = np.ones_like(values_N) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
        if values_N.shape != weights_N.shape:
            raise ValueError(f"{values_N.shape} values but {weights_N.shape} weights")
        return Mean(float(values_N @ weights_N), float(weights_N.sum()))

    def summary(self, name: str) -> dict[str, float]:
        return {name: self.total / self.count} if self.count else {}


@dataclass(frozen=True)
class Maximum(Metric):
    """The largest value."""

    value: float

    def summary(self, name: str) -> dict[str, float]:
        return {name: float(self.value)}


@dataclass(frozen=True, eq=False)
class Distribution(Metric):
    """Values one by one (trajectories, not tokens: all are kept), summarised exactly: mean, std, quantiles, min, max.

    ``objective/p`` becomes ``objective/p_mean``, ``objective/p_q05``, ...; a name that ends in a slash takes no
    underscore: ``reward/`` becomes ``reward/mean``, ...
    """

    values_N: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "values_N", np.asarray(self.values_N, dtype=np.float64).reshape(-1))

    def summary(self, name: str) -> dict[str, float]:
        if not self.values_N.size:
            return {}
        prefix = name if name.endswith("/") else f"{name}_"
        quantiles = np.quantile(self.values_N, QUANTILES)
        numbers = {"mean": self.values_N.mean(), "std": self.values_N.std()}
        numbers |= {"min": self.values_N.min(), "max": self.values_N.max()}
        numbers |= {f"q{100 * q:02.0f}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
        return {prefix + key: float(value) for key, value in numbers.items()}


def summarize(metrics: Mapping[str, float | Metric]) -> dict[str, float]:
    """Numbers by name. A bare number stands for itself.

    Raises:
        ValueError: two metrics give the same name a number.
    """
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        new = value.summary(name) if isinstance(value, Metric) else {name: float(value)}
        if clash := numbers.keys() & new.keys():
            raise ValueError(f"metric {name}: {', '.join(sorted(clash))} is given twice")
        numbers |= new
    return numbers
