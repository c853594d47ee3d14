"""Memory and throughput on a real GPU, by the scripts that measure them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITH_ROOT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def test_throughput_and_memory_of_a_step():
    """0.5e9 parameters in bf16, not a hundred times slower than such a GPU can; recomputation takes less memory."""
    command = [sys.executable, str(ROOT / "tools/bench/step.py"), "--size", "0.5B", "--device", "cuda", "--trajectory", "2048"]
    peaks = {}
    for recompute in ("none", "full"):
        done = subprocess.run(
            [*command, "--recompute", recompute], capture_output=True, text=True, timeout=140, cwd=ROOT, env=WITH_ROOT
        )
        assert done.returncode == 0, done.stderr[-2000:]
        *_, row, last = [line.split() for line in done.stdout.splitlines()]
        assert row[0] == "step" and float(row[2]) > 3000, done.stdout
        peaks[recompute] = float(last[-2])
    assert peaks["full"] < 0.8 * peaks["none"], peaks


def test_log_probs_take_an_eighth_of_the_memory_of_whole_logits():
    command = [sys.executable, str(ROOT / "tools/bench/log_probs.py"), "--device", "cuda", "--chunks", "256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=WITH_ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = [line.split() for line in done.stdout.splitlines() if line.startswith("chunk 256")]
    assert float(row[-2].rstrip("x")) <= 1 / 8, done.stdout
