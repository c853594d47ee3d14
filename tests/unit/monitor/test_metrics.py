"""Partial metrics of uneven parts combine into the statistics of the whole."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpo_megatron.monitor import Distribution, Maximum, Mean, Minimum, Sum, combine, summarize

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=40), st.data())
def test_any_split_gives_the_statistics_of_the_whole(values, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=5)))
    parts = [p for p in np.split(np.array(values), cuts)]
    weights = [np.abs(p) + 1 for p in parts]
    measured = [
        {
            "sum": Sum(float(p.sum())),
            "mean": Mean.of(p),
            "weighted": Mean.of(p, w),
            "all": Distribution(p),
        }
        | ({"max": Maximum(float(p.max())), "min": Minimum(float(p.min()))} if p.size else {})
        for p, w in zip(parts, weights, strict=True)
    ]
    numbers = summarize(combine(pickle.loads(pickle.dumps(measured))))
    whole = np.array(values)
    close = lambda value: pytest.approx(value, rel=1e-9, abs=1e-6)  # noqa: E731
    assert numbers["sum"] == close(whole.sum())
    assert numbers["mean"] == close(whole.mean())
    assert numbers["weighted"] == close(np.average(whole, weights=np.abs(whole) + 1))
    assert numbers["max"] == whole.max() and numbers["min"] == whole.min()
    assert numbers["all_std"] == close(whole.std())
    assert numbers["all_q05"] == close(np.quantile(whole, 0.05)) and numbers["all_q95"] == close(np.quantile(whole, 0.95))


def test_a_mean_of_means_would_be_wrong_here():
    parts = [{"x": Mean.of([1.0])}, {"x": Mean.of([0.0] * 9)}]
    assert summarize(combine(parts)) == {"x": pytest.approx(0.1)}


def test_a_part_without_data_changes_nothing_and_nothing_is_no_number():
    empty = {"x": Mean.of([]), "d": Distribution([])}
    assert summarize(empty) == {}
    assert summarize(combine([empty, {"x": Mean.of([3.0])}, {}])) == {"x": 3.0}


def test_nan_is_not_lost():
    assert np.isnan(summarize(combine([{"x": Maximum(1.0)}, {"x": Maximum(float("nan"))}, {"x": Maximum(2.0)}]))["x"])
    assert np.isnan(summarize(combine([{"x": Minimum(float("nan"))}, {"x": Minimum(2.0)}]))["x"])


def test_names_of_distributions():
    assert {"reward/mean", "reward/q50"} <= summarize({"reward/": Distribution([0.0, 1.0])}).keys()
    assert {"objective/p_mean", "objective/p_q05"} <= summarize({"objective/p": Distribution([0.0, 1.0])}).keys()


def test_different_reductions_under_one_name_are_an_error():
    with pytest.raises(TypeError, match="metric x: a Sum cannot be combined with a Mean"):
        combine([{"x": Sum(1.0)}, {"x": Mean.of([1.0])}])
    with pytest.raises(ValueError, match="p_mean is given twice"):
        summarize({"p_mean": 1.0, "p": Distribution([1.0])})
    with pytest.raises(ValueError, match="weights"):
        Mean.of([1.0, 2.0], [1.0])
