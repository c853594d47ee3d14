"""One worker process as the pool sees it: started, given jobs, heard, killed, replaced."""

from __future__ import annotations

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HEADER = struct.Struct("<Q")  # bytes of the message that follows
START_TIMEOUT_S = 120.0  # importing sympy on a busy machine
LARGEST_MESSAGE = 1 << 24  # bytes: scores, and an error's first 500 characters for each call
Score = float | str | list[float]  # of a response; an error; of each response of a group


@dataclass(frozen=True)
class Answer:
    """What a worker says about one job: for each of its calls a score, or scores, or an error; and what it cost."""

    scores: list[Score]
    seconds: float
    retries: int
    timeouts: int


class WorkerProcess:
    """One process, the job that it works on, and until when.

    Args:
        arguments: of the program `rewards.worker`.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.command = [sys.executable, "-m", "pmpo_megatron.rewards.worker", *arguments]
        self.failed_starts = 0
        self._start()

    def _start(self) -> None:
        # The package may be imported from a checkout that is not installed, and plug-ins from the caller's own path.
        paths = [str(Path(__file__).parents[2]), *filter(None, sys.path), os.getcwd()]
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)), OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, bufsize=0, start_new_session=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # both are pipes
        self.requests, self.results = self.process.stdin, self.process.stdout
        for pipe in (self.requests, self.results):
            os.set_blocking(pipe.fileno(), False)
        self.ready = False
        self.job: int | None = None
        self.began = 0.0
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self._buffer = b""

    def begin(self, job: int, limit: float) -> None:
        """Notes that ``job`` is given to it now, for ``limit`` seconds."""
        self.job, self.began = job, time.monotonic()
        self.deadline = self.began + limit

    def restart(self) -> None:
        if not self.ready:
            self.failed_starts += 1
        self.kill()
        self._start()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # it leads its own session: what a plug-in started goes with it
        self.process.wait()
        self.requests.close()
        self.results.close()

    def send(self, message: object) -> bool:
        """Hands ``message`` over; False if the worker did not take all of it before its deadline."""
        data = json.dumps(message, default=str).encode()  # Parquet has dates and decimals
        view = memoryview(HEADER.pack(len(data)) + data)
        try:
            while view:
                written = self.requests.write(view)
                view = view[written or 0 :]
                if written is None and not self._wait_for_room():
                    return False
        except BrokenPipeError:
            pass  # it died: the closed output says so at once
        return True

    def _wait_for_room(self) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self.requests, selectors.EVENT_WRITE)
            return bool(selector.select(timeout=max(0.0, self.deadline - time.monotonic())))

    def receive(self, calls: int) -> Answer | str | None:
        """The next message: "ready", or the answer to a job of ``calls``; None until it is complete.

        Raises:
            EOFError: the process is gone, or sends what is no message: its function has written to the pipe itself.
        """
        data = self.results.read(1 << 16)
        if data == b"":
            raise EOFError
        self._buffer += data or b""
        if len(self._buffer) < HEADER.size:
            return None
        size = HEADER.unpack_from(self._buffer)[0]
        if size > LARGEST_MESSAGE:
            raise EOFError
        if len(self._buffer) < HEADER.size + size:
            return None
        message, self._buffer = self._buffer[HEADER.size : HEADER.size + size], self._buffer[HEADER.size + size :]
        try:
            return checked(json.loads(message), calls, working=self.job is not None)
        except (ValueError, RecursionError):
            raise EOFError from None


def checked(message: object, calls: int, *, working: bool) -> Answer | str:
    """``message`` if a worker may send it now; else ValueError."""
    if message == "ready" and not working:
        return message
    if not working or not isinstance(message, list) or len(message) != 4:
        raise ValueError
    scores, seconds, retries, timeouts = message
    if type(seconds) is not float or type(retries) is not int or type(timeouts) is not int:
        raise ValueError
    if not isinstance(scores, list) or len(scores) != calls or not all(map(_is_score, scores)):
        raise ValueError
    return Answer(scores, seconds, retries, timeouts)


def _is_score(value: object) -> bool:
    if isinstance(value, list):
        return all(type(score) in (int, float) for score in value)
    return type(value) in (int, float, str)
