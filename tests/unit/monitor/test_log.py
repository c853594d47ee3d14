"""The record of a run: complete lines, exact resume, the same numbers in TensorBoard, clear errors."""

import builtins
import json
import logging
import math
import os

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.monitor import Distribution, MonitorConfig, RunLog
from pmpo_megatron.monitor.jsonl import read_json_lines

QUIET = MonitorConfig(progress="off", tensorboard=False, rollout_samples=2)


def log_steps(log, steps):
    for step in steps:
        log.log(
            step,
            {"reward/mean": step / 10, "objective/p": Distribution([0.0, step])},
            trajectories={"p": np.array([0.123456789, step]), "length": np.array([3, step])},
            rollouts=[{"prompt": "1+1=", "response": str(step), "reward": 0.0}] * 3,
        )


def contents(directory):
    records = {name: list(read_json_lines(directory / f"{name}.jsonl")) for name in ("metrics", "trajectories", "rollouts")}
    for record in records["metrics"]:
        del record["time"]
    return records


def test_what_is_written_is_what_was_measured(tmp_path):
    log = RunLog(QUIET, tmp_path, run={"model": {"path": "x"}}, total_steps=3)
    numbers = log.log(
        1, {"a": 1.0, "objective/p": Distribution([0.0, 1.0]), "bad": math.nan, "worse": -math.inf}, updates={"u": [1, 2]}
    )
    log_steps(log, [2])
    log.close()
    first, second = contents(tmp_path)["metrics"]
    assert first["objective/p_mean"] == 0.5 == numbers["objective/p_mean"] and first["a"] == 1.0 and first["u"] == [1, 2]
    assert math.isnan(float(first["bad"])) and float(first["worse"]) == -math.inf
    assert second["step"] == 2
    assert contents(tmp_path)["trajectories"] == [{"step": 2, "p": [0.12346, 2.0], "length": [3, 2]}]
    assert len(contents(tmp_path)["rollouts"]) == 2, "rollout_samples of the three"
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["config"] == {"model": {"path": "x"}} and "torch" in described["versions"]


def test_a_resumed_run_leaves_the_record_of_an_uninterrupted_one(tmp_path):
    whole = RunLog(QUIET, tmp_path / "whole", run={}, total_steps=6)
    log_steps(whole, range(1, 7))
    whole.close()
    first = RunLog(QUIET, tmp_path / "killed", run={}, total_steps=6)
    log_steps(first, [1, 2, 3])
    cursor = json.loads(json.dumps(first.cursor()))
    log_steps(first, [4, 5])
    for name in ("metrics", "trajectories"):  # killed in the middle of a line
        with (tmp_path / "killed" / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 6, "rew')
    second = RunLog(QUIET, tmp_path / "killed", run={}, total_steps=6, resume=cursor)
    log_steps(second, [4, 5, 6])
    second.close()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["resumed"][0]["after_step"] == 3


KILLED_RUN = {"optimizer": {"learning_rate": 0.1, "schedule": "constant"}}


def resumed(directory, cursor, caplog, run=None):
    """What opening the record again says."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pmpo_megatron"):
        log = RunLog(QUIET, directory, run=run or KILLED_RUN, total_steps=6, resume=cursor)
    log_steps(log, [5, 6])
    log.close()
    return [record.getMessage() for record in caplog.records]


@pytest.fixture
def killed(tmp_path):
    """A record of five steps, with the cursor of the fourth; its directory."""
    log = RunLog(QUIET, tmp_path, run=KILLED_RUN, total_steps=6)
    log_steps(log, [1, 2, 3, 4])
    cursor = json.loads(json.dumps(log.cursor()))
    log_steps(log, [5])
    log.close()
    return tmp_path, cursor


def test_what_was_lost_before_a_resume_is_said_once_and_the_rest_is_kept(killed, caplog):
    directory, cursor = killed
    path = directory / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\x00" * (len(lines[1]) - 1) + b"\n"
    lines[2] = b'{"step": "x"}'.ljust(len(lines[2]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    [said] = resumed(directory, cursor, caplog)
    assert "metrics.jsonl (0 bytes gone, 2 lines garbled; rounds 2 to 3 are missing)" in said and "traj" not in said
    assert [r["step"] for r in contents(directory)["metrics"]] == [1, 4, 5, 6]
    assert (directory / "metrics.jsonl.damaged").read_bytes() == b"".join(lines[:4])
    resumed(directory, cursor, caplog)  # the cursor counts bytes that are gone now
    assert [r["step"] for r in contents(directory)["metrics"]] == [1, 4, 5, 6], "no step comes twice"


def test_records_that_are_gone_or_cut_before_a_resume_are_named(killed, caplog):
    directory, cursor = killed
    (directory / "metrics.jsonl").unlink()
    os.truncate(directory / "trajectories.jsonl", 100)
    [said] = resumed(directory, cursor, caplog)
    assert f"metrics.jsonl ({cursor['bytes']['metrics']} bytes gone, 0 lines garbled; rounds 1 to 4 are missing)" in said
    assert "trajectories.jsonl (" in said and "rollouts" not in said
    assert [r["step"] for r in contents(directory)["metrics"]] == [5, 6]


def test_settings_that_changed_at_a_resume_are_listed_once(killed, caplog):
    directory, cursor = killed
    run = {"optimizer": {"learning_rate": 0.2, "schedule": "constant"}, "objective": {"rule": "ess"}}
    expected = ["optimizer.learning_rate: 0.1 -> 0.2", 'objective.rule: not set -> "ess"']
    assert resumed(directory, cursor, caplog, run) == [f"changed since the last start: {line}" for line in expected]
    assert resumed(directory, cursor, caplog, run) == []
    (directory / "run.json").write_text("[]")
    assert resumed(directory, cursor, caplog, run) == []


def test_a_new_run_in_an_old_directory_loses_nothing(tmp_path):
    for value in (1, 2, 3):
        log = RunLog(QUIET, tmp_path, run={}, total_steps=6)
        log_steps(log, [value])
        log.close()
    assert [r["step"] for r in contents(tmp_path)["metrics"]] == [3]
    earlier = sorted((tmp_path / "earlier").iterdir())
    assert [contents(path)["metrics"][0]["step"] for path in earlier] == [1, 2]


def test_tensorboard_has_the_same_numbers_and_hides_superseded_steps(tmp_path):
    config = MonitorConfig(progress="off", tensorboard=True)
    log = RunLog(config, tmp_path, run={}, total_steps=6)
    log_steps(log, [1, 2])
    cursor = log.cursor()
    log.log(3, {"reward/mean": 99.0})
    log.close()
    again = RunLog(config, tmp_path, run={}, total_steps=6, resume=cursor)
    log_steps(again, [3])
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(e.step, round(e.value, 6)) for e in events.Scalars("reward/mean")]
    assert scalars == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert events.Histograms("objective/p")[-1].histogram_value.max == 3.0


def test_wandb_missing_says_what_to_do(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_wandb(name, *rest, **options):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(ConfigError, match="monitor.wandb_project: 'p' needs the package wandb.*pip install wandb"):
        RunLog(MonitorConfig(wandb_project="p"), tmp_path, run={}, total_steps=1)


def test_a_full_disk_is_reported_and_the_run_goes_on(tmp_path, caplog):
    log = RunLog(QUIET, tmp_path, run={}, total_steps=6)
    log_steps(log, [1])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    kept, full = log._files["metrics"]._file, os.open("/dev/full", os.O_WRONLY)
    log._files["metrics"]._file = full
    real_truncate = os.ftruncate
    try:
        os.ftruncate = lambda *_: None  # /dev/full has no length
        with caplog.at_level(logging.WARNING):
            log.log(2, {"a": 1.0})
    finally:
        os.ftruncate = real_truncate
    assert "step 2 is not recorded: No space left on device" in caplog.text
    log._files["metrics"]._file = kept
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2"):
        list(read_json_lines(path))
