"""A worker process: reads jobs, calls of one reward function, from standard input and writes a score for each call.

A message is a length, then JSON: reading a pickle runs what it says, and a reward function may write anything.
A program of its own (``python -m pmpo_megatron.rewards.worker``) instead of multiprocessing: nothing of the trainer is
forked or imported again, whatever threads and process groups it holds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sys
import time
from typing import Any, BinaryIO

from pmpo_megatron.rewards.calls import Call, call_all, call_once, time_limit
from pmpo_megatron.rewards.process import HEADER


def main() -> None:
    settings = json.loads(sys.argv[1])
    names, memory_bytes = settings["functions"], settings["memory_bytes"]
    # Private copies of standard input and output, so that a function that reads or prints cannot garble the messages.
    source, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(3000)

    from pmpo_megatron.rewards.config import CodeConfig
    from pmpo_megatron.rewards.functions import kind_of, make_function

    code = CodeConfig(**settings["code"])
    functions = [make_function(name, evaluated=settings["evaluated"], code=code) for name in names]
    asynchronous = [kind_of(name).asynchronous for name in names]
    if "math" in names:
        import math_verify  # noqa: F401  the slow import happens before the first time-out begins

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    limits = {name: settings[name] for name in ("timeout", "concurrency", "attempts")}
    process = os.getpid()
    _write(results, "ready")
    with asyncio.Runner() as loop:  # one for all jobs: a plug-in may keep its connections
        while (job := _read(source)) is not None:
            number, calls = job
            limit = time_limit(len(calls), **limits) if asynchronous[number] else limits["timeout"]
            # The pool kills a slow worker; should the pool be gone, the kernel does. No handler, so nothing can hold it up.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 2 * limit + 10)
            started, retries, timeouts = time.monotonic(), 0, 0
            if asynchronous[number]:
                scores, retries, timeouts = loop.run(call_all(functions[number], calls, **limits))
            else:
                scores = [call_once(functions[number], call) for call in calls]
            signal.setitimer(signal.ITIMER_REAL, 0)
            if os.getpid() != process:
                os._exit(0)  # a function forked and both came back: one of them answers
            _write(results, [scores, time.monotonic() - started, retries, timeouts])


def _read(stream: BinaryIO) -> tuple[int, list[Call]] | None:
    """The next job: the number of a function, and what to call it with; None where the pool is gone."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return json.loads(stream.read(HEADER.unpack(header)[0]))


def _write(stream: BinaryIO, value: Any) -> None:
    data = json.dumps(value).encode()
    stream.write(HEADER.pack(len(data)) + data)
    stream.flush()


if __name__ == "__main__":
    main()
