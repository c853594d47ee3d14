"""One vLLM in a process of its own, here or on another node: started, called, watched and ended.

Which of them does what, `vllm_engine` decides; `node_agent` starts those of other nodes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import AuthenticationError, resource_tracker
from multiprocessing.connection import Client, Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout import vllm_child

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


@dataclass(frozen=True)
class Launch:
    """How a vLLM is started.

    Attributes:
        settings: arguments of vLLM's LLM.
        device: ``cpu`` or ``cuda``.
        threads: of the process, on CPU; None: its share of its host's cores.
        number: which of the host's engines this is, of ``engines``; it takes the next ``tensor_parallel`` GPUs.
    """

    settings: dict[str, Any]
    device: str
    threads: int | None
    number: int
    engines: int

    def environment(self) -> dict[str, str]:
        """What the environment of the process has beside this one's.

        Raises:
            RolloutError: the host has too few GPUs.
        """
        threads = self.threads or max(1, (os.cpu_count() or 1) // self.engines)
        variables = {"OMP_NUM_THREADS": str(threads)}
        if self.device == "cuda" and self.number:
            variables["CUDA_VISIBLE_DEVICES"] = visible_gpus(self.number, self.settings["tensor_parallel_size"])
        return variables


@dataclass(frozen=True)
class NodeAddress:
    """Where a `NodeAgent` listens; whoever knows the key starts processes there."""

    host: str
    port: int
    key: bytes


class VLLMProcess(ABC):
    """What `LocalProcess` and `RemoteProcess` share: the messages of `vllm_child` over a connection."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._connection: Connection | None = None
        self._sending = threading.Lock()  # `interrupt` comes from another thread
        self.given_up = False
        self._end: tuple[str, str] | None = None  # why a process on another node died, and the end of its log

    def start(self, timeout_s: float) -> None:
        """Starts it and waits until it holds the model.

        Raises:
            RolloutError: it does not start; with the end of its log.
        """
        _starting.add(self)
        try:
            self._connection = self.open()
            if self.given_up:
                raise EngineDied("the start was given up")
            self._wait(self._connection, "ready", timeout_s, "the start of the rollout engine")
        except (EngineDied, RolloutError, OSError) as error:
            log = self.log_tail()
            self.kill()
            raise RolloutError(f"the rollout engine did not start: {error}. {log}") from None
        finally:
            _starting.discard(self)

    def call(
        self, method: str, arguments: tuple, *, timeout_s: float, what: str, on_finished: Callable[[list], None] | None = None
    ) -> Any:
        """What ``method`` of the workers returned, or of `vllm_child`: "generate".

        Args:
            timeout_s: without a sign of life.
            what: of whom an error speaks.
            on_finished: takes responses as they come.

        Raises:
            EngineDied: the process ended, or gave no sign of life.
            RolloutError: vLLM raised an exception; with its traceback.
        """
        connection = self._connection
        if connection is None:
            raise EngineDied(f"{what}: it was ended and does not run")
        try:
            with self._sending:
                connection.send((method, arguments))
        except (BrokenPipeError, ConnectionResetError):
            raise EngineDied(self.why_dead()) from None
        return self._wait(connection, "value", timeout_s, what, on_finished)

    def _wait(
        self, connection: Connection, kind: str, timeout_s: float, what: str, on_finished: Callable[[list], None] | None = None
    ) -> Any:
        """The content of the next message of ``kind``; every message counts as a sign of life."""
        while True:
            if not connection.poll(timeout_s):
                raise EngineDied(f"{what}: no sign of life for {timeout_s:g} s")
            try:
                received, content = connection.recv()
            except (EOFError, ConnectionResetError):
                raise EngineDied(self.why_dead()) from None
            if received == "finished" and on_finished is not None:
                on_finished(content)
            elif received == "error":
                raise RolloutError(f"{what} failed:\n{content}")
            elif received == "ended":
                self._end = content
                raise EngineDied(self.why_dead())
            elif received == kind:
                return content

    @abstractmethod
    def open(self) -> Connection:
        """Starts the process; what leads to it."""

    @abstractmethod
    def why_dead(self) -> str: ...

    @abstractmethod
    def log_tail(self) -> str:
        """The end of what it wrote, for an error."""

    @abstractmethod
    def interrupt(self) -> None:
        """Ends the process, so that a `call` in another thread ends too; `kill` or `start` clears up."""

    @abstractmethod
    def kill(self) -> None:
        """Ends the process and everything that it started."""


class LocalProcess(VLLMProcess):
    """A vLLM on this host, forked from a server that has vLLM imported.

    Args:
        log_path: where it writes what it says.
        environment: of the process, beside that of ``launch``.
    """

    def __init__(self, launch: Launch, log_path: Path, environment: dict[str, str] | None = None) -> None:
        super().__init__(launch)
        os.environ["PMPO_ROLLOUT_DEVICE"] = launch.device  # the fork server imports what this device needs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pmpo_megatron.rollout.vllm_preload"])
        self._log_path, self._environment = log_path, launch.environment() | (environment or {})
        self._process: ForkServerProcess | None = None

    @property
    def process_id(self) -> int:
        assert self._process is not None and self._process.pid is not None  # it was started
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def open(self) -> Connection:
        connection, theirs = self._context.Pipe()
        alive, self._alive = self._context.Pipe(duplex=False)
        arguments = (theirs, alive, str(self._log_path), self.launch.settings, self._environment)
        process = self._process = self._context.Process(target=vllm_child.serve, args=arguments, name="vllm")
        with _without_interrupts():
            process.start()
        theirs.close()
        alive.close()
        return connection

    def why_dead(self) -> str:
        if self._process is None:
            return "the rollout engine's process was ended"
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        return f"the rollout engine's process {self._process.pid} {how}"

    def log_tail(self) -> str:
        try:
            return "The end of its log:\n" + "\n".join(self._log_path.read_text(errors="replace").splitlines()[-25:])
        except OSError:
            return "It wrote no log."

    def interrupt(self) -> None:
        if self._process is not None and self._process.pid is not None:
            self._process.kill()

    def kill(self) -> None:
        """Closing our end of the pipe reaches the workers, too, that a kill does not."""
        if self._process is None:
            return
        self._alive.close()
        if self._connection is not None:
            self._connection.close()
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = self._connection = None


class RemoteProcess(VLLMProcess):
    """A vLLM that the agent at ``address`` starts on its node, for as long as the connection to it lasts."""

    def __init__(self, launch: Launch, address: NodeAddress) -> None:
        super().__init__(launch)
        self._address = address

    def open(self) -> Connection:
        self._end = None
        try:
            connection = Client((self._address.host, self._address.port), authkey=self._address.key)
        except (EOFError, AuthenticationError) as error:
            raise EngineDied(f"who answers on {self._address.host} did not prove to be of this run ({error!r})") from None
        connection.send(self.launch)
        return connection

    def why_dead(self) -> str:
        try:
            while self._end is None and self._connection is not None and self._connection.poll():
                kind, content = self._connection.recv()
                self._end = content if kind == "ended" else None
        except (EOFError, OSError):
            pass  # the agent went without a word
        how = self._end[0] if self._end is not None else "the connection to the rollout engine broke"
        return f"{how} on {self._address.host}"

    def log_tail(self) -> str:
        return self._end[1] if self._end is not None else f"Its log was on {self._address.host}."

    def interrupt(self) -> None:
        with contextlib.suppress(OSError), self._sending:  # it may have ended
            if self._connection is not None:
                self._connection.send(("interrupt", ()))

    def kill(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def visible_gpus(number: int, tensor_parallel: int) -> str:
    """CUDA_VISIBLE_DEVICES with which the host's engine ``number`` takes its own GPUs.

    They come first and the others after them: it uses only its own, and can open the trainer's memory.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else [str(gpu) for gpu in range(torch.cuda.device_count())]
    first = number * tensor_parallel
    if first + tensor_parallel > len(gpus):
        last = first + tensor_parallel - 1
        raise RolloutError(f"engine {number} of the rollouts needs GPUs {first} to {last}; here are {len(gpus)}")
    return ",".join(gpus[first:] + gpus[:first])
