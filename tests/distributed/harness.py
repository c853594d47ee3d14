"""Runs a function in several real processes with gloo, with a bounded wait and the output of every rank on failure.

Ranks are forked from a process that has imported the package, which takes a fresh interpreter five seconds or more. They share
its seed of hashes; runs under torchrun in tests/integration, whose ranks do not, hold that no order of a set matters.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTED = [
    "tests.distributed.parity_worker",
    "tests.distributed.step_worker",
    "tests.distributed.checkpoint_worker",
    "megatron.core.models.gpt.gpt_model",  # which the package imports only to build a model
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    world_size: int,
    function: str,
    *arguments: Any,
    timeout: float = 240.0,
    gpu: bool = False,
    python: tuple[str, ...] = (sys.executable,),
) -> list:
    """Calls ``function`` ("package.module:name") with ``arguments`` on every rank and returns what each returned.

    torchrun's variables are set; the function initialises the process group itself. The arguments and results are pickled.
    Unless ``gpu``, the ranks see no GPU: the same tests run on every machine. ``python`` is the command that starts their
    interpreter.

    Raises:
        AssertionError: a rank failed or did not end in time; the message has the end of every rank's output.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "arguments").write_bytes(pickle.dumps((function, arguments)))
        common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(world_size))
        common |= dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo") | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
        ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
        codes = _fork(_server(gpu, python), {"directory": directory, "ranks": ranks, "timeout": timeout})
        if any(code != 0 for code in codes):
            logs = [(Path(directory) / f"log{rank}").read_text()[-3000:] for rank in range(world_size)]
            raise AssertionError(
                "\n".join(f"rank {r}: exit {c}\n{log}" for r, (c, log) in enumerate(zip(codes, logs, strict=True)))
            )
        return [pickle.loads((Path(directory) / f"result{rank}").read_bytes()) for rank in range(world_size)]


@functools.cache
def _server(gpu: bool, python: tuple[str, ...]) -> subprocess.Popen:
    """The process that ranks are forked from. For ranks with GPUs it imports nothing: a library might touch them."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [*python, "-m", "tests.distributed.harness", *([] if gpu else IMPORTED)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, **pipes)


def _fork(server: subprocess.Popen, request: dict[str, Any]) -> list[int | str]:
    """What `_serve` answers; a caller that is interrupted closes its end, which ends the ranks."""
    try:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())
    except BaseException:
        _server.cache_clear()
        server.communicate()
        raise


def _serve() -> str | None:
    """Forks ranks as each line of standard input asks and writes their exit codes; a rank returns with its directory."""
    for line in sys.stdin:
        request = json.loads(line)
        ranks = []
        for number, variables in enumerate(request["ranks"]):
            ranks.append(os.fork())
            if ranks[-1] == 0:
                os.environ.update(variables)
                _redirect(Path(request["directory"]) / f"log{number}")
                return request["directory"]
        print(json.dumps(_wait(ranks, time.monotonic() + request["timeout"])), flush=True)
    return None


def _redirect(log: Path) -> None:
    """Standard output and error go to ``log``; there is no input."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)


def _wait(ranks: list[int], deadline: float) -> list[int | str]:
    """Exit codes; a rank that fails gives the others two seconds, so that their own errors are seen as well."""
    codes: dict[int, int | str] = {}
    while len(codes) < len(ranks) and time.monotonic() < deadline:
        if select.select([sys.stdin], [], [], 0.02)[0]:  # closed: nobody waits any more
            break
        for rank in [rank for rank in ranks if rank not in codes]:
            ended, status = os.waitpid(rank, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + 2) if codes[rank] else deadline
    for rank in [rank for rank in ranks if rank not in codes]:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
        codes[rank] = "did not end in time"
    return [codes[rank] for rank in ranks]


def _run(directory: str) -> None:
    """What a rank does, to its end. Taking the interpreter down as well would copy every page of what was imported."""
    code = 1
    try:
        function, arguments = pickle.loads((Path(directory) / "arguments").read_bytes())
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(*arguments)
        (Path(directory) / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # a collection in a rank leaves what all share alone
    directory = _serve()
    if directory is not None:
        _run(directory)
    os._exit(0)
