"""Comparisons of variants over seeds: intervals and tests against textbook formulas, and no verdict where none is due."""

import json

import numpy as np
import pytest

from pmpo_megatron.errors import DataError
from pmpo_megatron.monitor.comparison import compare, interval_of_mean, read_variants, write_comparison

T_975_2 = 4.302652729911275  # Student's t, 2 degrees of freedom, from a table


def write_runs(root, finals: dict[str, list[float]]) -> None:
    for name, values in finals.items():
        for seed, value in enumerate(values, 1):
            directory = root / name / f"seed-{seed}"
            directory.mkdir(parents=True)
            rows = [
                {"step": s, "time": float(s), "eval/accuracy_mean": value * s / 10, "reward/mean": 0.1 * s} for s in (0, 5, 10)
            ]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_interval_of_the_mean_is_students():
    values = np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    mean, half = interval_of_mean(values)
    assert mean == pytest.approx([3.0, 5.0])
    assert half == pytest.approx([T_975_2 * np.sqrt(7.0) / np.sqrt(3), 0.0])
    assert np.isnan(interval_of_mean(values[:1])[1]).all()


def test_welch_and_holm():
    """Statistic and degrees of freedom by hand; the t distribution's tail by numerical integration."""
    base, one, two = np.array([0.5, 0.6, 0.7]), np.array([0.9, 0.8, 1.0]), np.array([0.55, 0.65, 0.6])
    found = {v.name: v for v in compare({"a": base, "b": one, "c": two}, "a")}
    raw = {}
    for name, other in (("b", one), ("c", two)):
        va, vb = base.var(ddof=1) / 3, other.var(ddof=1) / 3
        t, freedom = abs(other.mean() - base.mean()) / np.sqrt(va + vb), (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2)
        x = np.linspace(0, t, 200_001)
        density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        u = np.linspace(-np.pi / 2, np.pi / 2, 400_001)  # x = sqrt(freedom) tan u maps the whole line to an interval
        whole = np.sqrt(freedom) * np.trapezoid(np.cos(u) ** (freedom - 1), u)
        raw[name] = 1 - 2 * np.trapezoid(density, x) / whole
    assert found["b"].p_value == pytest.approx(min(1, 2 * raw["b"]), abs=1e-6)
    assert found["c"].p_value == pytest.approx(max(2 * raw["b"], raw["c"]), abs=1e-6)
    assert found["b"].differs and not found["c"].differs


def test_report_says_what_differs_and_what_does_not(tmp_path):
    write_runs(tmp_path, {"pmpo": [0.90, 0.91, 0.92], "worse": [0.50, 0.51, 0.49], "same": [0.89, 0.93, 0.91]})
    sentences = write_comparison(tmp_path, tmp_path / "r.html", reference="pmpo", title="T")
    assert any(s.startswith("worse: worse than pmpo in final accuracy (-0.410") for s in sentences)
    assert any(s.startswith("same: not told apart from pmpo in final accuracy by 3 seeds") for s in sentences)
    page = (tmp_path / "r.html").read_text()
    assert "0.910 ± 0.025" in page and page.count("<svg ") == 2 and "not told apart" in page


def test_unequal_seeds_are_counted_for_each_comparison(tmp_path):
    write_runs(tmp_path, {"pmpo": [0.90, 0.91, 0.92], "same": [0.89, 0.93], "single": [0.1]})
    sentences = write_comparison(tmp_path, tmp_path / "r.html", reference="pmpo", title="T")
    assert any(s.startswith("same: not told apart from pmpo in final accuracy by 2 seeds") for s in sentences)
    assert sentences[-1] == "single: one seed, nothing can be said about it."
    assert "3 variants, 1 to 3 seeds, equal budget" in (tmp_path / "r.html").read_text()


def test_one_seed_gives_no_verdict(tmp_path):
    write_runs(tmp_path, {"pmpo": [0.9], "other": [0.1]})
    assert write_comparison(tmp_path, tmp_path / "r.html", reference="pmpo", title="T") == [
        "One seed each: nothing can be said about differences."
    ]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no <variant>/seed-<n>"):
        read_variants(tmp_path)
    write_runs(tmp_path, {"grpo": [0.9]})
    with pytest.raises(DataError, match="has no variant 'pmpo'; it has grpo"):
        write_comparison(tmp_path, tmp_path / "r.html", reference="pmpo", title="T")
