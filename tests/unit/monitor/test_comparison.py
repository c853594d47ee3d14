"""Statistics of studies: intervals and tests against textbook formulas, and no verdict where none is due."""

import numpy as np
import pytest

from pmpo_megatron.config import build
from pmpo_megatron.errors import DataError
from pmpo_megatron.monitor.comparison import compare, interval_of_mean, verdict_sentences, write_comparison
from pmpo_megatron.monitor.study import GREEDY, REWARD, SAMPLED, StudyConfig, Variant, of_source

T_975_2 = 4.302652729911275  # Student's t, 2 degrees of freedom, from a table


def study(names, **changes):
    axes = {"objective": {name: [f"objective.preset={name}"] for name in names}}
    values = dict(title="T", config="c.yaml", rounds=10, axes=axes, reference=["pmpo"]) | changes
    return build(StudyConfig, values)


def variants(finals: dict[str, list[float]]) -> list[Variant]:
    """Runs of seeds 1, 2, ... whose accuracy grows to the given one."""
    rounds = (0, 5, 10)
    return [
        Variant(
            (name,),
            {
                seed: {metric: {n: value * n / 10 for n in rounds} for metric in (GREEDY, SAMPLED, REWARD)}
                for seed, value in enumerate(values, 1)
            },
        )
        for name, values in finals.items()
    ]


def test_interval_of_the_mean_is_students():
    values = np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    mean, half = interval_of_mean(values)
    assert mean == pytest.approx([3.0, 5.0])
    assert half == pytest.approx([T_975_2 * np.sqrt(7.0) / np.sqrt(3), 0.0])
    assert np.isnan(interval_of_mean(values[:1])[1]).all()


def test_paired_t_and_holm():
    """Differences by seed; with 2 degrees of freedom the t distribution has the closed form 1 - t / sqrt(2 + t^2)."""
    base = {1: 0.5, 2: 0.6, 3: 0.7}
    one, two = {1: 0.9, 2: 0.8, 3: 1.0, 4: 9.0}, {3: 0.72, 2: 0.65, 1: 0.58}
    found = {verdict.name: verdict for verdict in compare([("b", one, "a", base), ("c", two, "a", base)])}
    raw = {}
    for name, other in (("b", one), ("c", two)):
        difference = np.array([other[seed] - base[seed] for seed in (1, 2, 3)])
        t = difference.mean() / (difference.std(ddof=1) / np.sqrt(3))
        raw[name] = 1 - abs(t) / np.sqrt(2 + t**2)
        assert found[name].difference == pytest.approx(difference.mean()) and found[name].seeds == 3
    first, second = sorted(raw, key=raw.get)
    assert found[first].p_value == pytest.approx(2 * raw[first], rel=1e-6)
    assert found[second].p_value == pytest.approx(max(2 * raw[first], raw[second]), rel=1e-6)


def test_equal_differences_are_chance_and_not_certainty():
    """Accuracies are shares of some hundred problems: 1/96 three times over, with the rounding of results to six digits."""
    several = [{seed: float(f"{(24 + seed + more) / 96:.6g}") for seed in (1, 2, 3)} for more in (1, 0)]
    [verdict] = compare([("b", several[0], "a", several[1])])
    assert not verdict.differs and verdict.difference == pytest.approx(1 / 96, abs=1e-6)


def test_report_says_what_differs_and_what_does_not(tmp_path):
    finals = {"pmpo": [0.90, 0.91, 0.92], "worse": [0.50, 0.51, 0.53], "same": [0.89, 0.93, 0.91]}
    found = write_comparison(study(finals), variants(finals), tmp_path / "r.html")
    assert any(s.startswith("worse: worse than pmpo in final greedy accuracy (-0.397") for s in found)
    assert any(s.startswith("same: not told apart from pmpo in final greedy accuracy by 3 seeds") for s in found)
    page = (tmp_path / "r.html").read_text()
    assert (
        "0.910 ± 0.025" in page
        and page.count("<svg ") == 3 == len([*(tmp_path / "pictures").iterdir()])
        and "not told apart" in page
        and "0 of 3" in page
    )


def test_sources_are_compared_one_by_one(tmp_path):
    """The variant "better" is so in code alone, and "apart" was not trained on sums."""
    finals = {"pmpo": [0.50, 0.51, 0.52], "better": [0.50, 0.52, 0.51], "apart": [0.5, 0.5, 0.5]}
    compared = variants(finals)
    for variant, gain in zip(compared, (0.0, 0.25, 0.0), strict=True):
        for source, more in (("sums", 0.0), ("code", gain)):
            for run in variant.runs.values():
                run[of_source(GREEDY, source)] = {n: value + more * n / 10 for n, value in run[GREEDY].items()}
                if (variant.name, source) != ("apart", "sums"):
                    run[of_source(REWARD, source)] = dict(run[REWARD])
    found = write_comparison(study(finals, sources=["sums", "code"]), compared, tmp_path / "r.html")
    assert any(s.startswith("better: better than pmpo in final greedy accuracy in code (+0.25") for s in found)
    assert any(s.startswith("better: not told apart from pmpo in final greedy accuracy in sums") for s in found)
    assert any(s.startswith("better: not told apart from pmpo in final greedy accuracy by") for s in found)
    page = (tmp_path / "r.html").read_text()
    assert "<td>code</td><td>better</td><td>0.000 ± 0.000</td><td>0.760 ± 0.025</td>" in page
    drawn = {path.name for path in (tmp_path / "pictures").glob("sources-reward-mean-*.svg")}
    assert drawn == {"sources-reward-mean-pmpo.svg", "sources-reward-mean-better.svg"}, "of those trained on both"


def test_only_seeds_in_common_are_compared(tmp_path):
    finals = {"pmpo": [0.90, 0.91, 0.92, 0.93], "same": [0.89, 0.93, 0.92], "pair": [0.1, 0.1]}
    found = verdict_sentences(study(finals), variants(finals))
    assert any(s.startswith("same: not told apart from pmpo in final greedy accuracy by 3 seeds") for s in found)
    assert not any("pair" in s for s in found)
    assert verdict_sentences(study(finals), variants({"pmpo": [0.9], "same": [0.1]})) == [
        "No variant shares three seeds with its reference: nothing can be said about differences."
    ]


def test_nothing_finished_is_said(tmp_path):
    with pytest.raises(DataError, match="no run is finished yet"):
        write_comparison(study(["pmpo"]), [], tmp_path / "r.html")
