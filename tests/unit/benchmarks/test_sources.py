"""Names become files or data sets; rows of public data sets become lines of our own."""

import json

import pytest

from pmpo_megatron.benchmarks.sources import BENCHMARKS, PAPER, Benchmark, find_benchmarks, problem_file
from pmpo_megatron.errors import ConfigError, DataError


@pytest.mark.parametrize("name", ["AIME24", "aime24", "Aime-24"])
def test_names_are_found_in_any_spelling_and_prefer_the_file(tmp_path, name):
    [found] = find_benchmarks([name], tmp_path)
    assert found.name == "AIME24" and found.file is None and found.dataset
    (tmp_path / "aime24.jsonl").touch()
    [found] = find_benchmarks([name], tmp_path)
    assert found.file == tmp_path / "aime24.jsonl" and problem_file(found, tmp_path / "cache") == found.file


def test_every_benchmark_is_found_by_name_and_by_the_name_of_its_file():
    public = [benchmark for benchmark in BENCHMARKS if benchmark.dataset]
    assert {b.name for b in BENCHMARKS} - {b.name for b in public} == {"LiveCodeBench"}, "which is a file alone"
    for attribute in ("name", "stem"):
        assert find_benchmarks([getattr(b, attribute) for b in public], None) == public
    assert PAPER == ("AIME24", "AMC", "MATH500", "Minerva", "OlympiadBench")


def test_an_unknown_name_gets_the_nearest_one_or_all():
    with pytest.raises(ConfigError, match="'Minevra' is neither .*did you mean Minerva"):
        find_benchmarks(["Minevra"], None)
    with pytest.raises(ConfigError, match="there are AIME24, AMC"):
        find_benchmarks(["xyz"], None)


def test_files_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    with pytest.raises(ConfigError, match="mine.jsonl: no such file"):
        find_benchmarks([str(path)], None)
    path.touch()
    [found] = find_benchmarks([str(path)], None)
    assert (found.name, found.file) == ("mine", path)
    with pytest.raises(ConfigError, match="'mine' is there twice"):
        find_benchmarks([str(path), str(path)], None)


def data_set(directory, rows) -> str:
    directory.mkdir()
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    )
    return str(directory)


def test_a_data_set_is_fetched_once_and_cleaned(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = data_set(tmp_path / "set", [{"question": "1 + 1?", "answer": "First 1 #### 1, then more.\n#### 2"}])
    benchmark = Benchmark("B", "b", source, subset="main", problem_field="question", answer_after="####")
    path = problem_file(benchmark, tmp_path / "cache")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"problem": "1 + 1?", "answer": "2"}]
    path.write_text("kept")
    assert problem_file(benchmark, tmp_path / "cache").read_text() == "kept"


def test_a_data_set_that_is_absent_or_has_other_fields_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"B: the Hugging Face data set .*\[test\] cannot be fetched .* put b.jsonl into"):
        problem_file(Benchmark("B", "b", str(tmp_path / "none")), tmp_path / "cache")
    source = data_set(tmp_path / "set", [{"question": "1 + 1?", "answer": "2"}])
    with pytest.raises(DataError, match=r"\[test\]: row 1: no field 'problem'; it has question, answer"):
        problem_file(Benchmark("B", "b", source, subset="main"), tmp_path / "cache")
