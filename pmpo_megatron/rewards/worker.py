"""A worker process: reads (response, answers, metadata) from standard input and writes a score for each.

A message is a length, then JSON: reading a pickle runs what it says, and a reward function may write anything.
A program of its own (``python -m pmpo_megatron.rewards.worker``) instead of multiprocessing: nothing of the trainer is
forked or imported again, whatever threads and process groups it holds.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

from pmpo_megatron.rewards.pool import HEADER


def main() -> None:
    names, memory_bytes, timeout_s = sys.argv[1].split(","), int(sys.argv[2]), float(sys.argv[3])
    settings = json.loads(sys.argv[4])
    # Private copies of standard input and output, so that a function that reads or prints cannot garble the messages.
    source, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(3000)

    from pmpo_megatron.rewards.config import CodeConfig
    from pmpo_megatron.rewards.functions import make_function

    code = CodeConfig(**settings["code"])
    functions = [make_function(name, evaluated=settings["evaluated"], code=code) for name in names]
    if "math" in names:
        import math_verify  # noqa: F401  the slow import happens before the first time-out begins

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    process = os.getpid()
    _write(results, "ready")
    while (item := _read(source)) is not None:
        # The pool kills a slow worker; should the pool be gone, the kernel does. No handler, so nothing can hold it up.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 10)
        response, answers, metadata = item
        scores: list[float | str] = []
        for function in functions:
            try:
                scores.append(float(function(response, answers, metadata)))
            except Exception as error:  # math-verify and sympy raise anything; the item scores 0 and is counted
                scores.append(f"{type(error).__name__}: {error}"[:500])
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() != process:
            os._exit(0)  # a function forked and both came back: one of them answers
        _write(results, scores)


def _read(stream: BinaryIO) -> tuple[str, list[str], dict[str, Any]] | None:
    """The next response with its accepted answers; None where the pool is gone."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return json.loads(stream.read(HEADER.unpack(header)[0]))


def _write(stream: BinaryIO, value: object) -> None:
    data = json.dumps(value).encode()
    stream.write(HEADER.pack(len(data)) + data)
    stream.flush()


if __name__ == "__main__":
    main()
