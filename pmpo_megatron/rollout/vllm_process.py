"""One vLLM in a process of its own: started, asked, called, watched and ended.

Which of them does what, `vllm_engine` decides; `node_agent` starts those of other nodes, which `remote_process` reaches.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout import engine_log, vllm_child
from pmpo_megatron.rollout.engine import HERE
from pmpo_megatron.rollout.vllm_jobs import Batches
from pmpo_megatron.rollout.vllm_settings import Launch

T = TypeVar("T")
POLL_S = 1.0

_starting: set[VLLMProcess] = set()


def give_up_starts() -> None:
    """Ends every process that is being started in another thread; its `start` raises, if need be once it was forked."""
    for process in list(_starting):
        process.given_up = True
        process.interrupt()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started here never sees SIGINT, which a terminal sends to all of a run's processes: its parent ends it.

    The mask is inherited, also by what the fork server forks later, and is in place before any of its code runs.
    """
    resource_tracker.ensure_running()  # starting it would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class EngineDied(Exception):
    """The process ended, or answers no longer."""


class VLLMProcess(ABC):
    """The messages of `vllm_child` over a connection: a thread of its own reads what comes and watches for signs of life.

    Attributes:
        host: where it runs: `engine.HERE`, or the other node's address.
        requests: names of what it was asked and has not answered.
        fresh: it holds the newest weights, so that it may be asked.
        on_finished: called with the process and responses, as they come.
        on_ended: called with the process and `EngineDied` or `RolloutError` when it is gone without having been told to go.
    """

    host = HERE

    def __init__(self, launch: Launch, *, stall_s: float = math.inf) -> None:
        self.launch, self.stall_s = launch, stall_s
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        self._reader: threading.Thread | None = None
        self._calls: dict[int, Future[list[Any]]] = {}
        self._numbers, self._asked = itertools.count(), 0.0
        self.requests: set[str] = set()
        self.fresh = self.running = self.given_up = False
        self._ending = False
        self.on_finished: Callable[[VLLMProcess, list], None] | None = None
        self.on_ended: Callable[[VLLMProcess, Exception], None] | None = None

    def start(self, timeout_s: float) -> None:
        """Starts it and waits until it holds the model.

        Raises:
            RolloutError: it does not start; with the end of its log.
        """
        _starting.add(self)
        try:
            self._ending = False
            connection = self._connection = self.open(timeout_s)
            if self.given_up:
                raise EngineDied("the start was given up")
            if not connection.poll(timeout_s):
                raise EngineDied(f"no sign of life for {timeout_s:g} s")
            self._receive(connection)  # "ready"
        except (EngineDied, RolloutError, OSError) as error:
            log = self.log_tail()
            self.kill()
            raise RolloutError(f"the rollout engine did not start: {error}. {log}") from None
        finally:
            _starting.discard(self)
        self.running = True
        self._reader = threading.Thread(target=self._read, args=(connection,), daemon=True, name="vllm-reader")
        self._reader.start()

    def send(self, kind: str, content: Any) -> None:
        """A message; if the process is gone, its reader hears of it."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError), self._sending:
                connection.send((kind, content))

    def call(self, method: str, arguments: tuple) -> Future[list[Any]]:
        """What ``method`` of the workers returns: a list with one value for each; or RolloutError."""
        number, future = next(self._numbers), Future[list[Any]]()
        if not self.running:
            future.set_exception(RolloutError("the rollout engine does not run"))
            return future
        self._calls[number] = self._asked_now(future)
        self.send("call", (number, method, arguments))
        if not self.running:  # it ended meanwhile
            self._fail_calls(RolloutError("the rollout engine does not run"))
        return future

    def ask(self, batches: Batches) -> None:
        """Requests for responses, in one message."""
        self.requests.update(self._asked_now(name for _, prompts in batches for _, named in prompts for name, _ in named))
        self.send("add", batches)

    def _asked_now(self, what: T) -> T:
        """``what``; a process that had nothing to do owes a sign of life from now on."""
        if not self.requests and not self._calls:
            self._asked = time.monotonic()
        return what

    def _read(self, connection: Connection) -> None:
        heard = time.monotonic()
        try:
            while True:
                if connection.poll(POLL_S):
                    self._receive(connection)
                    heard = time.monotonic()
                elif self._gone():
                    raise EngineDied(self.why_dead())
                elif (self.requests or self._calls) and time.monotonic() - max(heard, self._asked) > self.stall_s:
                    raise EngineDied(f"the rollout engine gave no sign of life for {self.stall_s:g} s")
        except (EngineDied, RolloutError) as error:
            self._stopped(error)

    def _stopped(self, error: Exception) -> None:
        self.running = self.fresh = False
        self._fail_calls(RolloutError(f"{error}. {self.log_tail()}"))
        if not self._ending and self.on_ended is not None:
            self.on_ended(self, error)

    def _fail_calls(self, error: RolloutError) -> None:
        for number in list(self._calls):
            if (future := self._calls.pop(number, None)) is not None:
                future.set_exception(error)

    def _receive(self, connection: Connection) -> None:
        """Takes one message.

        Raises:
            EngineDied: the process is gone.
            RolloutError: vLLM raised an exception; with its traceback.
        """
        try:
            kind, content = connection.recv()
        except (EOFError, OSError):
            raise EngineDied(self.why_dead()) from None
        if kind == "finished" and self.on_finished is not None:
            self.on_finished(self, content)
        elif kind == "ended":
            self._end = content
            raise EngineDied(self.why_dead())
        elif kind in ("value", "error"):
            number, answer = content
            if number is None:
                raise RolloutError(f"the rollout engine failed:\n{answer}")
            future = self._calls.pop(number)
            if kind == "value":
                future.set_result(answer)
            else:
                future.set_exception(RolloutError(f"a call of the rollout engine's workers failed:\n{answer}"))

    def kill(self) -> None:
        """Ends the process and everything that it started."""
        self._ending = True
        self._end_process()
        if self._connection is not None:  # workers of a process that was killed may hold the other end a while
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as own:
                own.shutdown(socket.SHUT_RDWR)
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.requests.clear()
        self.running = self.fresh = False

    @abstractmethod
    def open(self, timeout_s: float) -> Connection:
        """Starts the process; what leads to it."""

    def _gone(self) -> bool:
        return False  # whether it has ended although the connection has not

    @abstractmethod
    def why_dead(self) -> str: ...
    @abstractmethod
    def log_tail(self) -> str:
        """What it wrote of its end, for an error."""

    @abstractmethod
    def interrupt(self) -> None:
        """Ends the process as if it had died; `kill` or `start` clears up."""

    @abstractmethod
    def _end_process(self) -> None:
        """Ends the process, so that the connection to it ends."""


class LocalProcess(VLLMProcess):
    """A vLLM on this host, forked from a server that has vLLM imported.

    Args:
        log_path: where it writes what it says.
        environment: of the process, beside that of ``launch``.
    """

    def __init__(
        self, launch: Launch, log_path: Path, environment: dict[str, str] | None = None, *, stall_s: float = math.inf
    ) -> None:
        super().__init__(launch, stall_s=stall_s)
        os.environ["PMPO_ROLLOUT_DEVICE"] = launch.device  # the fork server imports what this device needs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pmpo_megatron.rollout.vllm_preload"])
        self._log_path, self._environment = log_path, launch.environment() | (environment or {})
        self._process: ForkServerProcess | None = None
        self._log_start = 0

    @property
    def process_id(self) -> int:
        assert self._process is not None and self._process.pid is not None, "it was started"
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def open(self, timeout_s: float = math.inf) -> Connection:
        self._log_start = self._log_path.stat().st_size if self._log_path.exists() else 0
        connection, theirs = self._context.Pipe()
        alive, self._alive = self._context.Pipe(duplex=False)
        arguments = (theirs, alive, str(self._log_path), self.launch, self._environment)
        self._process = self._context.Process(target=vllm_child.serve, args=arguments, name="vllm")
        with _without_interrupts():
            self._process.start()
        theirs.close()
        alive.close()
        return connection

    def _gone(self) -> bool:
        return not self.runs

    def why_dead(self) -> str:
        assert self._process is not None, "it was started"
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        return f"the rollout engine's process {self._process.pid} {how}"

    def log_tail(self) -> str:
        return engine_log.cause(self._log_path, self._log_start)

    def interrupt(self) -> None:
        if self._process is not None and self._process.pid is not None:
            self._process.kill()

    def _end_process(self) -> None:
        """Closing our end of the pipe reaches the workers, too, that a kill does not."""
        if self._process is None or self._process.pid is None:
            return
        self._alive.close()
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
