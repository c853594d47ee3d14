"""The environment that `tools/install_gpu.sh` made, as users ask it: what it has, and whether a recipe dry-runs in it."""

import os
import subprocess

import pytest

from tests.emulation.machine import CALL_TIMEOUT_S, INSTALL
from tests.unit.test_recipes import RECIPES, run_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]  # the first test makes the environment


def test_the_check_says_what_is_there_and_what_is_missing(machine):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"LD_LIBRARY_PATH": str(machine.driver)}
    command = ["bash", str(INSTALL), "--venv", str(machine.python.parents[1]), "--check"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=CALL_TIMEOUT_S)
    assert done.returncode == 1 and "error:" not in done.stderr, done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert told["driver library libcuda.so.1"] == "there"
    assert told["torch"].startswith("2.13.0") and told["vllm"] == "0.32.0"
    assert told["megatron-core"] == "0.16.1"
    assert told["GPUs"].startswith("MISSING (PyTorch sees none); nvidia-smi")
    assert told["Transformer Engine"].startswith("MISSING (No module named 'transformer_engine')")


def test_a_recipe_dry_runs(machine):
    nodes, script = RECIPES["qwen2.5-math-7b/config.yaml"]
    bare = "rewards.code.isolation=unsandboxed"  # bubblewrap need not be here
    done = run_script([*script, "--dry-run", bare], PYTHON=str(machine.python), LD_LIBRARY_PATH=str(machine.driver))
    assert done.returncode == 0, done.stderr
    assert f"layout: {8 * nodes} processes" in done.stdout and "\nfits, with" in done.stdout
