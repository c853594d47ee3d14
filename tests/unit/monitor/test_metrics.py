"""Metrics become the statistics of what they cover."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpo_megatron.monitor import Distribution, Maximum, Mean, Sum, summarize

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=40))
def test_the_numbers_are_numpys(values):
    values = np.array(values)
    weights = np.abs(values) + 1
    metrics = {"sum": Sum(float(values.sum())), "mean": Mean.of(values), "weighted": Mean.of(values, weights)}
    numbers = summarize(metrics | {"max": Maximum(float(values.max())), "all": Distribution(values)})
    close = lambda value: pytest.approx(value, rel=1e-9, abs=1e-6)  # noqa: E731
    assert numbers["sum"] == close(values.sum()) and numbers["max"] == values.max()
    assert numbers["mean"] == close(values.mean())
    assert numbers["weighted"] == close(np.average(values, weights=weights))
    assert numbers["all_std"] == close(values.std())
    assert numbers["all_q05"] == close(np.quantile(values, 0.05)) and numbers["all_q95"] == close(np.quantile(values, 0.95))


def test_nothing_measured_is_no_number():
    assert summarize({"x": Mean.of([]), "d": Distribution([])}) == {}


def test_names_of_distributions():
    assert {"reward/mean", "reward/q50"} <= summarize({"reward/": Distribution([0.0, 1.0])}).keys()
    assert {"objective/p_mean", "objective/p_q05"} <= summarize({"objective/p": Distribution([0.0, 1.0])}).keys()


def test_clashes_are_errors():
    with pytest.raises(ValueError, match="p_mean is given twice"):
        summarize({"p_mean": 1.0, "p": Distribution([1.0])})
    with pytest.raises(ValueError, match="weights"):
        Mean.of([1.0, 2.0], [1.0])
