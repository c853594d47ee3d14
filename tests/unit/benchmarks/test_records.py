"""What is on disk after an interruption is gone on with, and nothing else."""

import json

import pytest

from pmpo_megatron.benchmarks.records import BenchmarkRecords, ModelDirectory, Record, Response
from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.types import Prompt

SETTINGS = {"temperature": 0.6, "stop": [], "seed": 0}


def prompts(count: int = 4) -> list[Prompt]:
    return [Prompt(index, (1, 2), f"problem {index}", (str(index),)) for index in range(count)]


def record(index: int, samples: int = 2) -> Record:
    responses = tuple(Response(f"it is α {index}\n", float(i % 2), "stop", 7) for i in range(samples))
    return Record(index, f"problem {index}", (str(index),), 2, responses)


def test_records_come_back_as_they_were_and_the_rest_is_missing(tmp_path):
    path = tmp_path / "a.jsonl"
    records = BenchmarkRecords(path, prompts(), samples=2)
    assert [prompt.index for prompt in records.missing] == [0, 1, 2, 3]
    for index in (2, 0):
        records.append(record(index))
    records.close()
    again = BenchmarkRecords(path, prompts(), samples=2)
    assert again.records == [record(0), record(2)] and [prompt.index for prompt in again.missing] == [1, 3]
    again.close()


def test_every_cut_of_the_last_line_costs_that_problem_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    records = BenchmarkRecords(path, prompts(), samples=2)
    records.append(record(0))
    whole = path.stat().st_size
    records.append(record(1))
    records.close()
    content = path.read_bytes()
    for size in range(whole, len(content)):
        path.write_bytes(content[:size])
        again = BenchmarkRecords(path, prompts(), samples=2)
        assert [prompt.index for prompt in again.missing] == [1, 2, 3]
        again.append(record(1))
        again.close()
        assert path.read_bytes() == content


def test_fewer_problems_use_the_records_that_there_are_and_more_go_on(tmp_path):
    path = tmp_path / "a.jsonl"
    records = BenchmarkRecords(path, prompts(3), samples=2)
    for index in range(3):
        records.append(record(index))
    records.close()
    fewer, more = (BenchmarkRecords(path, prompts(count), samples=2) for count in (2, 5))
    assert [each.index for each in fewer.records] == [0, 1] and fewer.missing == []
    assert [prompt.index for prompt in more.missing] == [3, 4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (Prompt(1, (1, 2), "problem one", ("1",)), "problem 1: .* has 'problem 1', the data now 'problem one'"),
        (Prompt(1, (1, 2), "problem 1", ("1", "one")), "answers 1: .*--force"),
    ],
)
def test_other_problems_under_the_same_name_are_refused(tmp_path, changed, message):
    path = tmp_path / "a.jsonl"
    records = BenchmarkRecords(path, prompts(), samples=2)
    records.append(record(1))
    with pytest.raises(ConfigError, match=message):
        BenchmarkRecords(path, [prompts()[0], changed], samples=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{]\n", "a.jsonl:2: not a line of JSON"),
        ('{"index": 1}\n', "a.jsonl:2: not a record of an evaluation"),
        (None, "a.jsonl:2: problem 0 is there twice"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    records = BenchmarkRecords(path, prompts(), samples=2)
    records.append(record(0))
    path.write_text(path.read_text() + (line or path.read_text()))
    with pytest.raises(DataError, match=message):
        BenchmarkRecords(path, prompts(), samples=2)


def test_another_number_of_responses_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    BenchmarkRecords(path, prompts(), samples=2).append(record(0))
    with pytest.raises(DataError, match="2 responses instead of 3"):
        BenchmarkRecords(path, prompts(), samples=3)


def model_directory(path, settings=SETTINGS, *, force=False) -> None:
    ModelDirectory(path, settings, force=force).close()


def test_other_settings_are_refused_by_name_unless_forced(tmp_path):
    model_directory(tmp_path / "model")
    (tmp_path / "model/a.jsonl").write_text("{}\n")
    model_directory(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"temperature: is 1.0, but the evaluation in .* began with 0.6; .*--force") as caught:
        model_directory(tmp_path / "model", SETTINGS | {"temperature": 1.0})
    assert caught.value.field == "temperature"
    with pytest.raises(ConfigError, match="new: is 1, but .* began with None"):
        model_directory(tmp_path / "model", SETTINGS | {"new": 1})
    model_directory(tmp_path / "model", SETTINGS | {"temperature": 1.0}, force=True)
    assert not (tmp_path / "model/a.jsonl").exists()
    assert json.loads((tmp_path / "model/settings.json").read_text())["temperature"] == 1.0


def test_settings_may_change_as_long_as_nothing_is_recorded(tmp_path):
    model_directory(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "exported").mkdir()
    model_directory(tmp_path, SETTINGS | {"temperature": 1.0})
    assert not (tmp_path / "exported").exists(), "it may be of other weights"
    assert json.loads((tmp_path / "settings.json").read_text())["temperature"] == 1.0


def test_two_evaluations_do_not_write_to_the_same_directory(tmp_path):
    first = ModelDirectory(tmp_path, SETTINGS, force=False)
    with pytest.raises(ConfigError, match="another evaluation is writing to"):
        ModelDirectory(tmp_path, SETTINGS, force=True)
    first.close()
    model_directory(tmp_path)
