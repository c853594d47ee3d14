"""Wrong input to pmpo-train: one line that names the field, exit code 2, nothing started and nothing written."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmpo_megatron.commands.train import main

ROOT = Path(__file__).parents[2]


def dry_run(capfd, directory, *overrides):
    settings = ["model.path=Qwen/Qwen2.5-0.5B", "data.source=arithmetic", f"run.directory={directory}/run"]
    return main(["--dry-run", *settings, *overrides]), capfd.readouterr()


def test_a_right_configuration_passes_and_writes_nothing(capfd, tmp_path):
    code, output = dry_run(capfd, tmp_path)
    assert code == 0 and output.out.endswith("dry run: nothing wrong found\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--world-size", "0"], "error: --world-size: 0 must be at least 1"),
        (["run.directory=/proc/version/x"], "error: run.directory: /proc/version/x: /proc/version is a file, not a directory"),
        (["monitor.wandb_project=x"], "error: monitor.wandb_project: needs the package wandb"),
        (["rewards.functions={maths: 1}"], "error: rewards.functions: 'maths' is none of math, boxed, exact"),
        (["optimizer.learning_rate=[1"], "error: optimizer.learning_rate: '[1' is not valid YAML: "),
        (["data.source=/no/such.jsonl"], "error: data.source: /no/such.jsonl: No such file or directory"),
        (["parallel.tensor=3"], "error: parallel.tensor: tensor 3"),
        (["optimizer.learningrate=1"], "error: optimizer.learningrate: unknown key"),
    ],
)
def test_wrong_input_is_one_line(capfd, tmp_path, overrides, message):
    if "wandb" in message and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    code, output = dry_run(capfd, tmp_path, *overrides)
    assert code == 2 and output.err.startswith(message) and output.err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        ([], {}, "error: model.path: is required"),
        (
            ["model.path=x", "data.source=arithmetic"],
            {"WORLD_SIZE": "many", "RANK": "x"},
            "error: environment: WORLD_SIZE='many'",
        ),
    ],
)
def test_the_command_itself(arguments, variables, message):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pmpo_megatron.commands.train", "--dry-run", *arguments],
        env=dict(os.environ, PYTHONPATH=str(ROOT), **variables), capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
