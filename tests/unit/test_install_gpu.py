"""tools/install_gpu.sh with a stand-in for the interpreter: what is compiled against what, and what is refused."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/install_gpu.sh"
# Answers what the script asks of an environment with a CUDA build of torch and no Transformer Engine; notes pip commands.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *getsitepackages*) echo "{site}" ;;
    *transformer-engine-torch*) exit 1 ;;
    *'version("cuda-toolkit")'*) echo 13.0.3 ;;
    "-m pip"*) echo "$* CUDA_HOME=$CUDA_HOME CPATH=$CPATH" >>{site}/asked; [ -z "$BROKEN" ] || [[ "$*" != *"$BROKEN"* ]] ;;
    -) cat >{site}/check; exit 0 ;;
esac
"""


@pytest.fixture
def environment(tmp_path):
    """The directory of an environment whose interpreter is the stand-in; beside it lies what pip would have installed."""
    for name in ("nvidia/cudnn/include/cudnn.h", "nvidia/cu13/bin/nvcc", "bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PYTHON.format(site=tmp_path))
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(*arguments, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CPATH")}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=250)


def test_transformer_engine_is_compiled_against_what_pip_brought(environment):
    done = run("--venv", environment)
    assert done.returncode == 0, done.stderr
    *_, compiler, engine = (environment / "asked").read_text().splitlines()
    assert "cuda-toolkit[nvcc,cccl]==13.0.3" in compiler, "of the version whose libraries torch brought"
    nvidia = environment / "nvidia"
    assert "--no-build-isolation transformer-engine[pytorch]==2.20.2" in engine
    assert engine.endswith(f"CUDA_HOME={nvidia}/cu13 CPATH={nvidia}/cudnn/include:{nvidia}/nccl/include")
    assert "libcuda.so.1" in (environment / "check").read_text()
    (environment / "asked").unlink()
    assert run("--venv", environment, "--without-transformer-engine").returncode == 0
    assert "transformer-engine" not in (environment / "asked").read_text()


def test_what_does_not_work_is_one_line(environment, tmp_path):
    done = run("--venv", environment, BROKEN="requirements/gpu.txt")
    assert done.returncode == 1 and done.stderr == "error: requirements/gpu.txt could not be installed\n"
    done = run("--venv", environment, BROKEN="transformer-engine[")
    assert f"the log is {environment}/transformer_engine.log" in done.stderr, "and the rest is checked all the same"
    (environment / "nvidia/cudnn/include/cudnn.h").unlink()
    done = run("--venv", environment)
    assert done.returncode == 1 and "cudnn.h is missing: is this a CUDA build of torch?" in done.stderr
    done = run("--venv", tmp_path / "absent", "--check")
    assert done.returncode == 1 and "no such interpreter; run this without --check first" in done.stderr
    assert "unknown option --frobnicate" in run("--frobnicate").stderr


def test_help():
    assert "--check        install nothing" in run("--help").stdout
