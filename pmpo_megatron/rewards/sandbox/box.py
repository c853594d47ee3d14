"""A sandbox from the outside: bubblewrap around a warm Python that runs one program after another.

What it holds back and what it does not: docs/rewards.md, "The sandbox".
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pmpo_megatron.errors import PmpoError
from pmpo_megatron.rewards.sandbox.syscalls import filter_file

INSIDE = Path(__file__).parent / "inside"
MOUNTED_AT = "/sandbox"  # where INSIDE is, inside
TMP_BYTES = 64 << 20
START_TIMEOUT_S = 120.0  # Python's start on a busy machine
GRACE_S = 5.0  # beyond a program's wall time, until a sandbox that does not answer is replaced
NOBODY = 65534
LIBRARIES = ("/lib", "/lib32", "/lib64", "/bin", "/sbin")
numbers = itertools.count()  # sandboxes of this process


@dataclass(frozen=True)
class Limits:
    """What one program may use: seconds, bytes (memory of all its processes; one file; output), processes and threads."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory: int = 1 << 30
    processes: int = 16
    file: int = 16 << 20
    output: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    ``over`` is ``exit`` (by itself, with status ``exit``, negative for a signal), ``end`` (from outside), or the limit that
    it went over: ``time``, ``memory``, ``files``, ``output``; ``lost`` if it took the sandbox with it.
    """

    over: str
    exit: int = -1
    output: str = ""

    @property
    def well(self) -> bool:
        return self.over == "exit" and self.exit == 0


class Sandbox:
    """One sandbox, of one thread at a time; started at once, and again whenever a program has spoiled it.

    Args:
        limits: of every program.
        isolated: False runs programs as the user, with limits and nothing else: they can read, send and delete.
    """

    def __init__(self, limits: Limits, *, isolated: bool = True) -> None:
        self.limits, self.isolated, self.starts = limits, isolated, 0
        self._directory = None if isolated else TemporaryDirectory(prefix="pmpo-unsandboxed-")
        self._start()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything inside, and waits until it has ended."""
        self._end()
        if self._directory is not None:
            self._directory.cleanup()

    def run(self, program: str, stdin: str = "") -> Outcome:
        """``program`` as a script, with ``stdin`` as its standard input."""
        self._give({"program": program, "mode": "script", "input": stdin})
        while isinstance(message := self._receive(), str):
            pass
        return message

    def answer_calls(self, program: str) -> Talk:
        """``program`` is run, and its functions answer calls (`inside/program.py`, `answer_calls`)."""
        return Talk(self, {"program": program, "mode": "calls"})

    def run_tests(self, tests: str, names: Sequence[str]) -> Talk:
        """``tests`` are run; what they call by ``names`` asks the outside (`inside/program.py`, `run_tests`)."""
        return Talk(self, {"program": tests, "mode": "tests", "names": list(names)})

    def _start(self) -> None:
        self._buffer, self._ready, self.starts = b"", False, self.starts + 1
        seccomp = filter_file() if self.isolated else None
        user = sandbox_user() if os.geteuid() == 0 and self.isolated else 0
        command = (
            bubblewrap(seccomp, user) if seccomp is not None else [sys.executable, str(INSIDE / "zygote.py"), "plain", "0"]
        )
        environment = {"PATH": "/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        environment |= {
            "PYTHONPATH": sysconfig.get_path("purelib"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=environment,
                pass_fds=[] if seccomp is None else [seccomp],
                cwd=self._directory.name if self._directory else "/",
            )
        finally:
            if seccomp is not None:
                os.close(seccomp)
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None  # all three are pipes
        self._stdin, self._stdout, self._stderr = stdin, stdout, stderr
        self._deadline = time.monotonic() + START_TIMEOUT_S

    def _end(self) -> None:
        self._stdin.close()  # process 1 ends with it, and the namespace with process 1
        self._process.kill()
        self._process.wait()
        while self._stdout.read(1 << 16):  # until the last process inside has let go of it
            pass
        self._stdout.close()
        self._stderr.close()

    def restart(self) -> None:
        self._end()
        self._start()

    def wait(self) -> None:
        """Waits until the sandbox takes programs.

        Raises:
            PmpoError: it does not start; with what it said.
        """
        while not self._ready:
            if (message := self._line()) is None:
                self._process.kill()
                said = self._stderr.read().decode(errors="replace").strip()
                raise PmpoError(f"the sandbox does not start: {said or 'no answer'}")
            self._ready = "ready" in message

    def _give(self, job: dict) -> None:
        self.wait()
        job["limits"] = asdict(self.limits)
        try:
            self.send(job)
        except OSError:  # somebody else has ended it
            self.restart()
            self.wait()
            self.send(job)
        self._deadline = time.monotonic() + self.limits.wall_s + GRACE_S

    def send(self, message: dict) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[self._stdin.write(data) :]

    def _receive(self) -> str | Outcome:
        """A line of the program's, or how it ended."""
        message = self._line()
        if message is None:
            self.restart()
            return Outcome("lost")
        if "line" in message:
            return message["line"]
        if message.pop("last"):
            self.restart()
        return Outcome(**message)

    def _line(self) -> dict | None:
        """The next message of the sandbox; None if it has ended, or does not answer in time."""
        while b"\n" not in self._buffer:
            if not select.select([self._stdout], [], [], max(0.0, self._deadline - time.monotonic()))[0]:
                return None
            data = self._stdout.read(1 << 16)
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


class Talk:
    """A program that answers line by line. `outcome` is None while it runs."""

    def __init__(self, sandbox: Sandbox, job: dict) -> None:
        self.sandbox = sandbox
        self.outcome: Outcome | None = None
        sandbox._give(job)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, question: object) -> object | None:
        """Sends a value, and returns the answer; None once the program is over, or if it answers no JSON."""
        with suppress(OSError):
            self.sandbox.send({"line": json.dumps(question)})
        return self.hear()

    def hear(self) -> object | None:
        """The next value that the program sends."""
        if self.outcome is not None:
            return None
        message = self.sandbox._receive()
        if isinstance(message, Outcome):
            self.outcome = message
            return None
        try:
            return json.loads(message)
        except (ValueError, RecursionError):
            return None

    def close(self) -> None:
        """Ends the program, if it still runs."""
        if self.outcome is None:
            with suppress(OSError):
                self.sandbox.send({"end": True})
            while not isinstance(message := self.sandbox._receive(), Outcome):
                pass
            self.outcome = message


def bubblewrap(seccomp: int, user: int) -> list[str]:
    """The command of a sandbox.

    Args:
        seccomp: descriptor of the filter of system calls.
        user: as root, the user id that programs get; 0: an ordinary user, who makes a user namespace.

    Raises:
        PmpoError: bubblewrap is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise PmpoError("the sandbox needs bubblewrap: apt-get install bubblewrap, or dnf install bubblewrap")
    base = os.path.realpath(sys.base_prefix)
    command = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--as-pid-1", "--die-with-parent", "--new-session", "--hostname", "sandbox", "--seccomp", str(seccomp)]
    command += ["--cap-drop", "ALL"]
    if user:  # root's mounts may be of directories that the user cannot reach; the zygote becomes the user
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += ["--ro-bind", "/usr", "/usr", "--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in LIBRARIES:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind-try", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"]
    for path in (base, sysconfig.get_path("purelib")):
        for parent in reversed(Path(path).parents):
            command += ["--dir", str(parent)]  # readable, though it may be somebody's home outside
        command += ["--ro-bind", path, path]
    command += ["--ro-bind", str(INSIDE), MOUNTED_AT, "--chdir", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]
    return [*command, os.path.realpath(sys.executable), f"{MOUNTED_AT}/zygote.py", "sandboxed", str(user)]


def sandbox_user() -> int:
    """A user id of no other sandbox and hardly of anybody: limits on processes count by user."""
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    half = max(int(first) + int(length) for first, _, length in ranges) // 2
    return half + (os.getpid() * 64 + next(numbers) % 64) % (half - 2)
