"""Studies: their definition, their raw results through kills and from another machine, and what counts as collapse."""

import json
from pathlib import Path

import numpy as np
import pytest

from pmpo_megatron.config import build, read_yaml
from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.monitor.comparison import write_comparison
from pmpo_megatron.monitor.read import read_run
from pmpo_megatron.monitor.study import (
    GREEDY,
    OF_SOURCES,
    REWARD,
    UPDATES,
    Results,
    StudyConfig,
    has_collapsed,
    of_source,
    pick,
    read_study,
)

EXAMPLES = Path(__file__).parents[3] / "examples"
AXES = {"rule": {"ess": ["objective.preset=pmpo"], "p-1": ["objective.p=1"]}, "drift": {"4": ["a.b=4"], "16": ["a.b=16"]}}
VALUES = dict(title="T", config="c.yaml", rounds=4, axes=AXES, reference=["ess", "*"], heat_map=["rule", "drift"])


def finished(directory, scale=1.0):
    directory.mkdir(parents=True)
    rows = [{"step": 0, GREEDY: 0.1}] + [
        {"step": n, REWARD: scale * n, GREEDY: scale * n, UPDATES: [scale * n, 10.0 * n]} for n in (1, 2, 3, 4)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(directory)


def test_variants_and_what_each_is_compared_with():
    study = build(StudyConfig, VALUES)
    assert study.variants()["p-1", "16"] == ["objective.p=1", "a.b=16"] and len(study.variants()) == 4
    assert study.reference_of(("p-1", "16")) == ("ess", "16")
    assert pick(study.variants(), ["p-1/4"]) == [("p-1", "4")] and len(pick(study.variants(), ["p-1", "4"])) == 3
    with pytest.raises(ConfigError, match="'gmpo' is no level; the variants are ess/4, ess/16, p-1/4"):
        pick(study.variants(), ["gmpo"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"reference": ["ess"]}, r"reference: \['ess'\]: must name a level"),
        ({"reference": ["p-2", "*"]}, "reference"),
        ({"heat_map": ["rule", "x"]}, "heat_map.*must be two of rule, drift"),
        ({"axes": {"rule": {"a/b": []}, "drift": {"4": []}}}, "'a/b' names a directory"),
        ({"axes": {"rule": {"ess": "x=1"}}}, "ess: must be a list of overrides"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_what_is_wrong_in_a_study_is_named(change, words):
    with pytest.raises(ConfigError, match=words):
        build(StudyConfig, VALUES | change)


def test_results_go_on_from_the_file_alone(tmp_path):
    study, path = build(StudyConfig, VALUES), tmp_path / "out" / "results.csv"
    key = study.key(AXES["rule"]["ess"], {})
    Results(path, study).add(("ess", "4"), 1, key, finished(tmp_path / "a"))
    again = Results(path, study)
    assert again.find(("ess", "4"), 1, key) and not again.find(("ess", "4"), 2, key) and not again.find(("ess", "16"), 1, key)
    again.add(("p-1", "4"), 1, key, finished(tmp_path / "b", scale=0.5))
    ess, other = Results(path, study).variants()
    assert ess.name == "ess/4" and ess.by_seed(GREEDY, "last") == {1: 4.0} and other.by_seed(REWARD, "mean") == {1: 1.25}
    norms = [1, 10, 2, 20, 3, 30, 4, 40]
    assert [ess.by_seed(UPDATES, name)[1] for name in ("mean", "q99", "max")] == pytest.approx(
        [np.mean(norms), np.quantile(norms, 0.99), 40]
    )
    rounds, values = ess.curves(GREEDY)
    assert rounds.tolist() == [0, 1, 2, 3, 4] and values.tolist() == [[0.1, 1.0, 2.0, 3.0, 4.0]]
    write_comparison(study, [ess, other], tmp_path / "r.html")
    assert "Final greedy accuracy" in (tmp_path / "r.html").read_text(), "heat maps with empty cells"


def test_what_a_study_keeps_of_sources_is_what_runs_log(tmp_path):
    """The names are those of training.sources and training.held_out."""
    study, directory = build(StudyConfig, VALUES | {"sources": ["sums", "code"]}), tmp_path / "run"
    logged = {"eval/code/accuracy_mean": 0.25, "eval/code/greedy_accuracy_mean": 0.5, "eval/sums/greedy_accuracy_mean": 0.75}
    logged |= {f"source/code/{name}": 0.125 for name in ("reward_mean", "p_mean", "p_q05", "ess_fraction", "clip_fraction")}
    finished(directory)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4} | logged) + "\n")
    path = tmp_path / "results.csv"
    Results(path, study).add(("ess", "4"), 1, "key", read_run(directory))
    [variant] = Results(path, study).variants()
    kept = {name: points[4] for name, points in variant.runs[1].items() if name in logged}
    assert kept == logged and {of_source(metric, "code") for metric in OF_SOURCES} < logged.keys()
    with pytest.raises(DataError, match="is it of another study"):
        Results(path, build(StudyConfig, VALUES))


def test_results_of_other_settings_are_never_mixed(tmp_path):
    study, path = build(StudyConfig, VALUES), tmp_path / "results.csv"
    keys = {study.key(["x=1"], {}), study.key(["x=2"], {}), study.key(["x=1"], {"run": {"seed": 2}})}
    assert len(keys | {build(StudyConfig, VALUES | {"rounds": 5}).key(["x=1"], {})}) == 4
    replaced, same = {"x": 3}, build(StudyConfig, VALUES | {"settings": ["x=4"]})
    assert same.key(["x=1"], replaced) == study.key(["x=1"], {}), "what a level replaces does not count"
    Results(path, study).add(("ess", "4"), 1, "before", finished(tmp_path / "a"))
    with pytest.raises(DataError, match="ess/4, seed 1, was measured with other settings"):
        Results(path, study).find(("ess", "4"), 1, "now")
    with pytest.raises(DataError, match="is it of another study"):
        Results(path, build(StudyConfig, VALUES | {"axes": {"other": {"a": []}}, "reference": ["a"], "heat_map": []}))
    path.write_text(path.read_text().replace(",0.1,", ",x,"))
    with pytest.raises(DataError, match=r"results.csv:2: could not convert"):
        Results(path, study).variants()


@pytest.mark.parametrize(
    "rewards, collapsed",
    [
        ([0.3, 0.4, 0.5, 0.6, 0.6], False),
        ([0.3, 0.5, 0.6, 0.6, 0.3, 0.2, 0.2], True),
        ([0.3, 0.3, 0.3, 0.05, 0.04, 0.03], True),
        ([0.3, 0.6, 0.1, 0.5, 0.3], False),
        ([0.3, float("nan"), 0.4], True),
        ([0.5], False),
    ],
)
def test_collapse(rewards, collapsed):
    assert has_collapsed(rewards) is collapsed


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/results.csv")), ids=lambda path: path.parent.name)
def test_a_study_goes_on_from_the_rows_that_are_recorded(path):
    study = read_study(path.parent / "study.yaml")
    configuration, results, recorded = read_yaml(EXAMPLES.parent / study.config), Results(path, study), 0
    for levels, overrides in study.variants().items():
        key = study.key(overrides, configuration)
        recorded += sum(results.find(levels, seed, key) for seed in range(1, study.seeds + 1))
    assert recorded == sum(len(variant.runs) for variant in results.variants()) > 0, "rows of no variant"
