"""The reward `code`: the response's program runs in a sandbox, and what it returns is compared here, outside."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pmpo_megatron.errors import ConfigError, PmpoError
from pmpo_megatron.rewards.code_tests import (
    Assertions,
    CallTest,
    ScriptTest,
    last_program,
    read_tests,
    same_output,
    same_value,
)
from pmpo_megatron.rewards.config import CodeConfig
from pmpo_megatron.rewards.sandbox.box import Limits, Sandbox
from pmpo_megatron.rewards.sandbox.inside.program import decode, encode

MIB = 1 << 20
NO_ARGUMENTS = encode({})
HOW_TO_ALLOW = (
    "; rewards.functions has code, whose programs need it. Allow user namespaces (Ubuntu 24.04: sysctl "
    "kernel.apparmor_restrict_unprivileged_userns=0; Docker: --cap-add SYS_ADMIN and --security-opt seccomp=unconfined, "
    "apparmor=unconfined and systempaths=unconfined), with bubblewrap 0.7 or later, or run programs as your own user, who may "
    "lose what is theirs, with rewards.code.isolation=unsandboxed"
)
# Each line would succeed on an open machine. What it prints is what the sandbox does not hold back.
PROBE = """
import ctypes, os, socket
call = ctypes.CDLL(None).syscall
def attempt(name, function):
    try:
        function()
        print(name)
    except (OSError, ValueError, AssertionError):
        pass
attempt("sockets", lambda: socket.socket())
attempt("writing to /usr", lambda: open("/usr/pmpo-probe", "w"))
attempt("writing to /", lambda: open("/pmpo-probe", "w"))
attempt("writing to /dev/shm", lambda: open("/dev/shm/pmpo-probe", "w"))
attempt("processes of others", lambda: open("/proc/%d/stat" % OUTSIDE))
attempt("memory of the first process", lambda: open("/proc/1/mem", "rb"))
attempt("root", lambda: os.setuid(0))
assert os.getpid() < 100 and os.getuid() != 0
print("done")
"""


class CodeReward:
    """1.0 if the response's last block of code passes every test of its row, else 0.0. For one thread.

    Expected values never enter the sandbox that runs the program: outputs and returned values are compared here, and
    assertions run in a second sandbox, where the program's functions are stand-ins that hand over plain data.
    """

    def __init__(self, config: CodeConfig) -> None:
        limits = Limits(
            wall_s=config.wall_s, cpu_s=math.ceil(config.wall_s), memory=config.memory_mib * MIB, processes=config.processes
        )
        self._make = lambda: Sandbox(limits, isolated=config.isolation == "bubblewrap")
        self._programs = self._make()
        self._tests: Sandbox | None = None

    def close(self) -> None:
        for sandbox in (self._programs, self._tests):
            if sandbox is not None:
                sandbox.close()

    def __call__(self, response: str, answers: Sequence[str], metadata: Mapping[str, Any]) -> float:
        """The score.

        Raises:
            ValueError: the row has no tests, or tests that cannot run.
        """
        tests = read_tests(metadata)
        program = last_program(response)
        if program is None:
            return 0.0
        checks: dict[type, Callable[[str, list[Any]], bool]]
        checks = {ScriptTest: self._script, CallTest: self._calls, Assertions: self._assertions}
        kinds = [kind for kind in checks if any(isinstance(test, kind) for test in tests)]
        return float(all(checks[kind](program, [test for test in tests if isinstance(test, kind)]) for kind in kinds))

    def _script(self, program: str, tests: Sequence[ScriptTest]) -> bool:
        outcomes = ((test, self._programs.run(program, test.stdin)) for test in tests)
        return all(outcome.well and same_output(outcome.output, test.stdout) for test, outcome in outcomes)

    def _calls(self, program: str, tests: Sequence[CallTest]) -> bool:
        with self._programs.answer_calls(program) as talk:
            return all(_returns(test, talk.ask({"call": [test.name, encode(test.arguments), NO_ARGUMENTS]})) for test in tests)

    def _assertions(self, program: str, tests: Sequence[Assertions]) -> bool:
        self._tests = self._tests or self._make()
        with self._programs.answer_calls(program) as theirs, self._tests.run_tests(tests[0].code, tests[0].names) as ours:
            message = ours.hear()
            while isinstance(message, dict) and "call" in message:
                answer = theirs.ask(message)
                known = isinstance(answer, dict) and ("value" in answer or isinstance(answer.get("raised"), str))
                message = ours.ask(answer if known else {"raised": "RuntimeError"})
        if isinstance(message, dict) and message.get("broken"):
            raise ValueError(f"metadata.tests cannot run: {message['failed']}")
        return isinstance(message, dict) and message.get("passed") is True


def check_sandbox(config: CodeConfig) -> None:
    """Runs a program that tries the walls of the sandbox.

    Raises:
        ConfigError: it does not start here or holds something open; says what to install or to allow.
    """
    if config.isolation != "bubblewrap":
        return
    try:
        with Sandbox(Limits()) as sandbox:
            outcome = sandbox.run(f"OUTSIDE = {os.getpid()}\n{PROBE}")
    except PmpoError as error:
        raise ConfigError("rewards.code", f"{error}{HOW_TO_ALLOW}") from None
    open_doors = outcome.output.split("\n")[:-2]
    if not outcome.well or open_doors:
        raise ConfigError("rewards.code", f"the sandbox does not hold: {', '.join(open_doors) or outcome}{HOW_TO_ALLOW}")


def _returns(test: CallTest, answer: object) -> bool:
    if not isinstance(answer, dict) or "value" not in answer:
        return False
    try:
        value = decode(answer["value"])
        first = test.expected[0] if isinstance(test.expected, list) and test.expected else None
        # APPS and TACO wrap an expected value in a list, and their graders accept both.
        return same_value(value, test.expected) or first is not None and same_value(value, first)
    except (ValueError, TypeError, RecursionError):
        return False
