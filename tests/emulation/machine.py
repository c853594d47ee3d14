"""Makes the environment of a GPU machine, and calls functions in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, run_ranks

INSTALL = ROOT / "tools/install_gpu.sh"
REQUIREMENTS = ROOT / "requirements/gpu.txt"
INSTALL_TIMEOUT_S = 3000  # 10 GB of wheels
TRANSFORMER_ENGINE = "transformer-engine"  # in an environment, the directory of its Python part
CALL_TIMEOUT_S = 1500  # importing vLLM alone takes a minute
DRIVER = Path(__file__).parent / "driver"
PYTHON_VERSION = "3.11"
DIRECTORY_VARIABLE = "GPU_VENVS"  # where the environment is kept; without it, in the project's root


@dataclass(frozen=True)
class Machine:
    """An environment of CUDA builds.

    Attributes:
        python: its interpreter.
        transformer_engine: a directory with Transformer Engine's Python part, which is not in the environment itself.
        driver: a directory with stand-ins for NVIDIA's driver libraries.
    """

    python: Path
    transformer_engine: Path
    driver: Path

    def call(self, function: str, *arguments, ranks: int = 1) -> list:
        """What ``function`` ("package.module:name") returns on each of ``ranks`` processes in this environment, which find the
        stand-ins for the driver's libraries, as if they ran on a node of 8 H100s."""
        python = ("env", f"LD_LIBRARY_PATH={self.driver}", "HF_HUB_OFFLINE=1", str(self.python))
        return run_ranks(ranks, function, *arguments, gpu=True, python=python, timeout=CALL_TIMEOUT_S)


def make_machine(driver: Path) -> Machine:
    """The environment, made by the installer that users run unless it is there already; skips the test without Python 3.11."""
    python = shutil.which(f"python{PYTHON_VERSION}")
    if python is None:
        pytest.skip(f"no python{PYTHON_VERSION} here")
    venv = Path(os.environ.get(DIRECTORY_VARIABLE, ROOT)).absolute() / f".venv-gpu-py{PYTHON_VERSION}"
    made_from = venv / REQUIREMENTS.name
    if not made_from.exists() or made_from.read_text() != REQUIREMENTS.read_text():
        _install(python, venv)
        shutil.copy(REQUIREMENTS, made_from)
    return Machine(venv / "bin/python", venv / TRANSFORMER_ENGINE, driver)


def _install(python: str, venv: Path) -> None:
    command = ["bash", str(INSTALL), "--venv", str(venv), "--python", python, "--without-transformer-engine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    assert "error:" not in done.stderr, done.stderr  # its exit code also says that there is no GPU
    [wanted] = re.findall(r"transformer-engine\[pytorch\](==[\d.]+)", INSTALL.read_text())
    packages = [f"transformer-engine{wanted}", "onnxscript", "onnx", "onnx-ir", "ml_dtypes"]  # what its Python part imports
    pip = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]
    subprocess.run([*pip, str(venv / TRANSFORMER_ENGINE), *packages], check=True, timeout=INSTALL_TIMEOUT_S)


def compile_driver(directory: Path) -> Path:
    """``directory`` with the stand-ins for the driver's libraries; skips the test where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler cc here (on Debian and Ubuntu: apt install gcc)")
    for source, library in (("cuda.c", "libcuda.so.1"), ("nvml.c", "libnvidia-ml.so.1")):
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(directory / library), str(DRIVER / source)]
        subprocess.run(command, check=True, timeout=60)
    return directory
