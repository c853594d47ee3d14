"""The numerical tests pass with the instructions of every x86-64 processor, as far as this one can play the others."""

import os
import subprocess
import sys

import pytest

from tests.distributed.harness import ROOT

SETTINGS = {
    "no-vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "products-of-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "products-of-sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
REPRESENTATIVE = [
    "tests/unit/algo/test_importance.py",
    "tests/unit/algo/test_entry_point.py",
    "tests/unit/model",
    "tests/unit/parallel/test_adam.py",
    "tests/distributed/test_gradient.py",
    "tests/distributed/test_log_probs.py",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_are_right_with_other_instructions(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *REPRESENTATIVE]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS[name], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
