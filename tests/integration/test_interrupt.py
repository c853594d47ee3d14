"""Ctrl-C while a run starts: one line, exit code 130, and nothing that goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration import runs
from tests.integration.engine_worker import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("qwen2", tmp_path_factory.mktemp("model") / "model")


def group(number: int) -> list[str]:
    """Command lines of what runs in the process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == number and fields[0] != "Z":
                found.append(stat.with_name("cmdline").read_text().replace("\0", " "))
        except OSError:
            pass  # it has ended
    return found


def interrupt(model, directory, after: float, *, said: str = "") -> None:
    """As a terminal does: SIGINT to every process of the run, ``after`` seconds after ``said`` appeared in its output."""
    process = runs.start(model, directory)
    try:
        runs.wait_until(lambda: said in runs.output(directory), timeout=100, what=said)
        time.sleep(after)
        os.killpg(process.pid, signal.SIGINT)
        text = runs.finish(process, directory, timeout=20, code=130)
        assert "Traceback" not in text and "EOFError" not in text and text.count("interrupted\n") == 1, text
        runs.wait_until(lambda: not group(process.pid), timeout=20, what="the end of every process")
    finally:
        if group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def test_while_the_engine_starts(model, tmp_path):
    """The fork server imports vLLM, and the trainer builds the policy."""
    interrupt(model, tmp_path / "run", 0.5, said="processes on cpu")


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.5, 1.5, 3.0, 5.0, 8.0])
def test_at_any_moment(model, tmp_path, after):
    interrupt(model, tmp_path / "run", after)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 2.0, 4.0, 6.0])
def test_at_any_moment_of_the_engines_start(model, tmp_path, after):
    interrupt(model, tmp_path / "run", after, said="processes on cpu")


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_while_a_command_imports_its_libraries(name, tmp_path):
    """Torch is loaded file by file for a second or more; a traceback would go through it."""
    command = [sys.executable, "-m", f"pmpo_megatron.commands.{name}"]
    command += ["model", "--out", str(tmp_path)] if name == "evaluate" else ["model.path=model"]
    with subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        runs.wait_until(lambda: "libtorch" in maps.read_text(), timeout=100, what="the import of torch")
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=100)[0], process.returncode) == ("interrupted\n", 130)
