"""The first process of a sandbox: Python, started once, that forks a child for each program it is handed.

The sandbox's interpreter runs this file from a read-only directory; nothing else of the project can be imported there.
Messages are lines of JSON: from outside {"program", "mode", "limits", ...}, then {"line"} for its standard input and
{"end"}; to the outside {"line"} for each line of a program that talks, and at last {"over", "exit", "output"}. As process 1
of its namespace of process ids it cannot be killed from inside, and ends whatever a program leaves behind.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections import deque

from program import MODULES, PR_SET_DUMPABLE, become, send  # its neighbour, inside

WATCH_MS = 50  # how often memory and files of a running program are looked at
MAX_FILES = 10_000  # in /tmp


class Lines:
    """Messages from a descriptor, one JSON value a line; several may arrive at once."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._rest = descriptor, b""
        self.waiting: deque[dict] = deque()

    def fill(self) -> bool:
        """Reads what is there, at least a byte; False at the end."""
        data = os.read(self.descriptor, 1 << 20)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.waiting.extend(map(json.loads, lines))
        return bool(data)

    def next_job(self) -> dict | None:
        """The next message that asks for a program: what was meant for one that is over is passed by."""
        while True:
            while self.waiting:
                if "mode" in (message := self.waiting.popleft()):
                    return message
            if not self.fill():
                return None


def serve(sandboxed: bool, user: int) -> None:
    """Runs programs until the outside closes its end. ``user``: who to become, if this began as root; else 0."""
    if sandboxed and os.getpid() != 1:
        raise SystemExit("not process 1 of its own namespace: what is not the sandbox's could be ended")
    control, results = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for name in MODULES:
        importlib.import_module(name)
    sys.path.remove(os.path.dirname(__file__))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sandboxed:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if the machine runs out of memory, programs go first
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if sandboxed:
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no program may open this process's memory
        before = set(os.listdir("/tmp"))
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    send(results, {"ready": True})
    lines = Lines(control)
    while (job := lines.next_job()) is not None:
        outcome = Run(job, lines, results, sandboxed).finish()
        outcome["last"] = sandboxed and set(os.listdir("/tmp")) != before  # its files must not meet the next program
        send(results, outcome)
        if outcome["last"]:
            return


class Run:
    """One program: a child with its standard input and output in pipes, watched until it is over."""

    def __init__(self, job: dict, lines: Lines, results: int, sandboxed: bool) -> None:
        self.job, self.lines, self.results, self.sandboxed = job, lines, results, sandboxed
        self.limits, self.talks = job["limits"], job["mode"] != "script"
        self.pending = memoryview(job.get("input", "").encode(errors="surrogatepass"))
        self.output = bytearray()
        self.deadline = time.monotonic() + self.limits["wall_s"]
        theirs_in, self.input = os.pipe()
        self.source, theirs_out = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            become(job, theirs_in, theirs_out, sandboxed)
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self.input, False)
        os.set_blocking(self.source, False)
        self.ended = os.pidfd_open(self.child)

    def finish(self) -> dict:
        """Waits until the program is over, ends what it left, and says how it went."""
        over = ""
        while not over:
            self._feed()
            ready = self._poll()
            over = self._collect()
            if self.lines.descriptor in ready and not self.lines.fill():
                os._exit(0)  # the outside is no more, and without its process 1 the namespace ends
            over = over or self._obey()
            if self.ended in ready:
                over = over or self._collect() or "exit"
            over = over or self._excess()
        status = self._end()
        text = bytes(self.output).decode(errors="replace")
        return {"over": over, "exit": os.waitstatus_to_exitcode(status), "output": "" if self.talks else text}

    def _poll(self) -> set[int]:
        poll = select.poll()
        for descriptor in (self.lines.descriptor, self.ended, self.source):
            if descriptor >= 0:
                poll.register(descriptor, select.POLLIN)
        if self.input >= 0 and self.pending:
            poll.register(self.input, select.POLLOUT)
        return {descriptor for descriptor, _ in poll.poll(0 if self.lines.waiting else WATCH_MS)}

    def _feed(self) -> None:
        if self.input < 0:
            return
        try:
            while self.pending:
                self.pending = self.pending[os.write(self.input, self.pending) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.pending = memoryview(b"")
        if not self.talks:
            os.close(self.input)
            self.input = -1

    def _collect(self) -> str:
        while self.source >= 0:
            try:
                data = os.read(self.source, 1 << 16)
            except BlockingIOError:
                break
            if not data:
                os.close(self.source)
                self.source = -1
            self.output += data
            if len(self.output) > self.limits["output"]:
                return "output"
        if self.talks:
            *lines, self.output = self.output.split(b"\n")
            for line in lines:
                send(self.results, {"line": line.decode(errors="replace")})
        return ""

    def _obey(self) -> str:
        while self.lines.waiting:
            message = self.lines.waiting.popleft()
            if "end" in message:
                return "end"
            self.pending = memoryview(bytes(self.pending) + message["line"].encode(errors="surrogatepass") + b"\n")
        return ""

    def _excess(self) -> str:
        """Which limit the program is over: wall time, or what all its processes together hold."""
        if time.monotonic() > self.deadline:
            return "time"
        if not self.sandboxed:
            return ""
        files = os.statvfs("/tmp")
        if files.f_files - files.f_ffree > MAX_FILES:
            return "files"
        return "memory" if resident_bytes() > self.limits["memory"] else ""

    def _end(self) -> int:
        """Ends the child and every process that came of it; the child's wait status."""
        try:
            if self.sandboxed and os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)  # all of this namespace but this process, at once: none can fork out of it
            else:
                os.killpg(self.child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status = os.waitpid(self.child, 0)[1]
        while self.sandboxed:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        for descriptor in (self.input, self.source, self.ended):
            if descriptor >= 0:
                os.close(descriptor)
        return status


def resident_bytes() -> int:
    """Memory of all processes of the namespace but the first."""
    pages = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/statm") as file:
                    pages += int(file.read().split()[1])
            except (OSError, IndexError):
                pass  # it has ended
    return pages * resource.getpagesize()


if __name__ == "__main__":
    serve(sys.argv[1] == "sandboxed", int(sys.argv[2]))
