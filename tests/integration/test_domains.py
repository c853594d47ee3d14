"""The study of three domains as users run it, small: a start model is taught, runs are made once, the report is by domain."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards.code import check_sandbox
from pmpo_megatron.rewards.config import CodeConfig

ROOT = Path(__file__).parents[2]
SMALL = ["data.problems=40", "batch.prompts_per_round=6", "batch.steps_per_round=2", "evaluation.max_problems=4"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command, code=0):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_the_study_of_three_domains(tmp_path):
    try:
        check_sandbox(CodeConfig())
    except ConfigError as error:
        pytest.skip(f"no sandbox here: {error}")
    script = (ROOT / "examples/domains/run.sh").read_text()
    taught = re.search(r"--tasks .+(?= --steps)", script)[0].split()
    run("tools/make_tiny_model.py", "--out", str(tmp_path / "model"), *taught, "--steps", "3")
    values = yaml.safe_load((ROOT / "examples/domains/study.yaml").read_text())
    values["settings"] = [f"model.path={tmp_path}/model", *SMALL]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    study = ("tools/study.py", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--seeds", "1", "--rounds", "1")
    piece = (*study, "--only", "pmpo/mixture", "gmpo/programs")
    assert "2 runs to do" in run(*piece)
    assert "0 runs to do" in run(*piece)
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open(newline="")))
    last = {(row["objective"], row["trained_on"]): row for row in rows if row["round"] == "1"}
    mixture, apart = last["pmpo", "mixture"], last["gmpo", "programs"]
    for source in ("arithmetic", "programs", "choices"):
        assert float(mixture[f"source/{source}/p_mean"]) <= 1.0 and mixture[f"eval/{source}/greedy_accuracy_mean"]
        assert apart[f"eval/{source}/accuracy_mean"], "held-out problems are of all domains"
        assert bool(apart[f"source/{source}/ess_fraction"]) is (source == "programs")
    report = (tmp_path / "out/report.html").read_text()
    assert "<td>choices</td><td>gmpo/programs</td>" in report and "Sources beside each other" in report
