"""The benchmarks that also run on GPUs run here, small: their own code works, and what they print can be read."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script, *arguments):
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/bench" / script), *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_step():
    layout = ["--size", "tiny-moe", "--processes", "2", "--context", "2", "--expert", "2"]
    output = run("step.py", "--trajectory", "64", "--steps", "1", "--device", "cpu", *layout)
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
    assert "512 tokens in a step" in output and "CP2 DP1 EP2" in output
    for name in ("score", "step"):
        seconds, rate = map(float, rows[name])
        assert seconds > 0 and rate == pytest.approx(512 / seconds, rel=0.5)


def test_log_probs():
    output = run(
        "log_probs.py", "--tokens", "512", "--vocabulary", "20000", "--hidden", "32", "--chunks", "64", "--repeats", "1"
    )
    [row] = [line.split() for line in output.splitlines() if line.startswith("chunk 64")]
    assert float(row[-1]) < 1e-5 and float(row[-2].rstrip("x")) < 1, output


def test_objective():
    output = run("objective.py", "--tokens", "4096", "--ranks", "1", "2", "--repeats", "1")
    assert "collectives, bisection / pmpo: 33; at least 10: met" in output


def test_round_broadcast():
    output = run("round_broadcast.py", "--trajectories", "32", "--tokens", "512", "--processes", "2", "--repeats", "1")
    assert "32 trajectories of 512 tokens to 2 processes" in output
    assert float(output.split("seconds ")[1].split(",")[0]) > 0 and ", another " in output


def test_gpu_check_says_what_runs_and_what_does_not(tmp_path):
    command = [sys.executable, "-W", "ignore", "tools/gpu_check.py", "--device", "cpu", "--out", str(tmp_path)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([*command, "--only", "numerics", "step"], capture_output=True, text=True, cwd=ROOT, env=environment)
    report = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == 0 and report["numerics"] | {"seconds": 0} == {
        "outcome": "skipped",
        "reason": "needs a GPU",
        "figures": {},
        "seconds": 0,
    }
    assert report["step"]["outcome"] == "passed" and "planned" in report["step"]["figures"]["printed"][-1]


def test_a_failed_part_of_gpu_check_names_its_log(tmp_path):
    module = runpy.run_path(str(ROOT / "tools/gpu_check.py"))
    check, failed = module["Check"](tmp_path, "cpu"), module["Failed"]
    assert check.run("part", [sys.executable, "-c", "print(7)"], 60) == "7\n"
    with pytest.raises(failed, match=f"exit code 3: the last words; see {tmp_path}/part.log"):
        check.run("part", [sys.executable, "-c", "print('the last words'); exit(3)"], 60)
    with pytest.raises(failed, match="not done after 1 s"):
        check.run("part", ["sleep", "600"], 1)
