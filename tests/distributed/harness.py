"""Runs a function in several real processes with gloo, with a bounded wait and the output of every rank on failure."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    world_size: int,
    function: str,
    *arguments: Any,
    timeout: float = 240.0,
    env: dict[str, str] | None = None,
    gpu: bool = False,
) -> list:
    """Calls ``function`` ("package.module:name") with ``arguments`` on every rank and returns what each returned.

    torchrun's variables are set; the function initialises the process group itself. The arguments and results are pickled.
    Unless ``gpu``, the ranks see no GPU: the same tests run on every machine.

    Raises:
        AssertionError: a rank failed or did not end in time; the message has the end of every rank's output.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "arguments").write_bytes(pickle.dumps((function, arguments)))
        common = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(world_size))
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        common |= dict(OMP_NUM_THREADS="1", PYTHONPATH=paths, GLOO_SOCKET_IFNAME="lo")
        common |= ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}) | (env or {})
        processes = []
        for rank in range(world_size):
            with open(Path(directory) / f"log{rank}", "wb") as log:
                command = [sys.executable, "-m", "tests.distributed.harness", directory]
                rank_env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=rank_env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if any(code != 0 for code in codes):
            logs = [(Path(directory) / f"log{rank}").read_text()[-3000:] for rank in range(world_size)]
            raise AssertionError(
                "\n".join(f"rank {r}: exit {c}\n{log}" for r, (c, log) in enumerate(zip(codes, logs, strict=True)))
            )
        return [pickle.loads((Path(directory) / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen], deadline: float) -> list[int | str]:
    """Exit codes; a rank that fails gives the others two seconds, so that their own errors are seen as well."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 2)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return ["did not end in time" if process.poll() is None else process.returncode for process in processes]


def _main(directory: str) -> None:
    import importlib

    function, arguments = pickle.loads((Path(directory) / "arguments").read_bytes())
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(*arguments)
    (Path(directory) / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(sys.argv[1])
