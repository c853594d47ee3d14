"""What a sandbox's child becomes: a script, functions that are called from outside, or tests of such functions.

Like its neighbour zygote.py it runs where nothing of the project can be imported.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, TextIO

PR_SET_DUMPABLE = 4
MAX_OPEN_FILES = 64
MODULES = (
    "array bisect cmath collections copy datetime decimal fractions functools heapq io itertools json math operator random re"
    " statistics string struct textwrap time typing"
).split()
# What LeetCode's own runner has imported before a solution (LiveCodeBench's grader does the same).
PRELUDE = (
    "import " + ", ".join(MODULES) + "\nfrom typing import *\nfrom collections import *\nfrom functools import *\n"
    "from heapq import *\nfrom bisect import *\nfrom itertools import *\nfrom math import *\n"
)


def encode(value: object) -> object:
    """``value`` as JSON that tells lists from tuples and sets; TypeError for anything but plain data."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    for name, kinds in (("tuple", tuple), ("set", (set, frozenset))):
        if isinstance(value, kinds):
            return {name: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": list(value)}
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return encode(value.tolist())
    raise TypeError(f"a {type(value).__name__} is no plain data")


def decode(value: Any) -> Any:
    """What `encode` was given. ValueError, TypeError or RecursionError for what it never makes."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    makers: dict[str, Callable[[Any], Any]]
    makers = {"tuple": tuple, "set": set, "dict": dict, "bytes": bytes, "complex": lambda parts: complex(*parts)}
    if kind not in makers or not isinstance(content, list):
        raise ValueError(f"{kind} is no kind of plain data")
    return makers[kind](decode(content))


def send(descriptor: int, message: object) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(descriptor, data) :]


def become(job: dict, source: int, sink: int, sandboxed: bool) -> None:
    """The child turns into the program; never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(source, 0)
        os.dup2(sink, 1)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        limits = job["limits"]
        set_limit(resource.RLIMIT_CORE, 0)
        set_limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
        set_limit(resource.RLIMIT_CPU, limits["cpu_s"])
        set_limit(resource.RLIMIT_AS, limits["memory"])
        set_limit(resource.RLIMIT_FSIZE, limits["file"])
        if sandboxed:  # elsewhere all processes of the user count, also those that are none of the program's
            set_limit(resource.RLIMIT_NPROC, limits["processes"])
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # its own /proc/self and /dev/stdin
        code = {"script": run_script, "calls": answer_calls, "tests": run_tests}[job["mode"]](job)
    finally:
        os._exit(code)


def set_limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def execute(program: str, name: str, prelude: str = "") -> types.ModuleType:
    """``program`` run as module ``name``, where pickle and dataclasses find it."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(prelude, module.__dict__)
    exec(compile(program, "solution.py", "exec"), module.__dict__)
    return module


def run_script(job: dict) -> int:
    sys.stdin = open(0, encoding="utf-8", errors="replace")
    sys.stdout = output = open(1, "w", encoding="utf-8", errors="replace")
    try:
        execute(job["program"], "__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    output.flush()
    return code & 255


def claim_pipes() -> tuple[TextIO, int]:
    """Private ends of the pipes; what a program reads is empty, and what it prints goes nowhere."""
    source, sink = os.fdopen(os.dup(0), "r", encoding="utf-8", errors="surrogatepass"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.stdin, sys.stdout = open(0), open(1, "w")
    return source, sink


def answer_calls(job: dict) -> int:
    """A program's functions, called from outside: {"call": [name, arguments, named]} -> {"value"} or {"raised"}."""
    source, sink = claim_pipes()
    try:
        space, trouble = execute(job["program"], "solution", PRELUDE).__dict__, None
    except BaseException as error:
        space, trouble = {}, error
    for line in source:
        name, arguments, named = json.loads(line)["call"]
        try:
            if trouble is not None:
                raise trouble
            function = space[name] if name in space else getattr(space["Solution"](), name)
            answer = {"value": encode(function(*decode(arguments), **decode(named)))}
            send(sink, answer)
        except BaseException as error:
            send(sink, {"raised": type(error).__name__})
    return 0


def run_tests(job: dict) -> int:
    """Tests in a sandbox without the program: its functions are stand-ins that ask the outside, and get plain data."""
    source, sink = claim_pipes()

    def stand_in(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            send(sink, {"call": [name, encode(list(arguments)), encode(named)]})
            answer = json.loads(source.readline())
            if "value" in answer:
                return decode(answer["value"])
            kind = getattr(sys.modules["builtins"], answer["raised"], None)
            raise kind() if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError(answer["raised"])

        return call

    module = types.ModuleType("tests")
    module.__dict__.update({name: importlib.import_module(name) for name in MODULES})
    module.__dict__.update({name: stand_in(name) for name in job["names"]})
    try:
        exec(compile(job["program"], "tests.py", "exec"), module.__dict__)
        send(sink, {"passed": True})
    except BaseException as error:
        send(
            sink, {"failed": f"{type(error).__name__}: {error}"[:300], "broken": isinstance(error, (ImportError, SyntaxError))}
        )
    return 0
