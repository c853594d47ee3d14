"""One vLLM in a process of its own: started, called, watched and killed. Which process does what, `vllm_engine` decides."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout import vllm_child


class EngineDied(Exception):
    """The process ended, or stopped to answer."""


class VLLMProcess:
    """A vLLM, forked from a server that has vLLM imported.

    Args:
        settings: arguments of vLLM's LLM.
        device: ``cpu`` or ``cuda``.
        threads: of the process, on CPU.
        visible_gpus: CUDA_VISIBLE_DEVICES of the process; None: as here.
        log_path: where it writes what it says.
    """

    def __init__(
        self, settings: dict[str, Any], *, device: str, threads: int, visible_gpus: str | None, log_path: Path
    ) -> None:
        os.environ["PMPO_ROLLOUT_DEVICE"] = device  # the fork server imports what this device needs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pmpo_megatron.rollout.vllm_preload"])
        self._arguments = (str(log_path), settings, threads, visible_gpus)
        self._log_path = log_path
        self._process = None

    @property
    def process_id(self) -> int:
        return self._process.pid

    def start(self, timeout_s: float) -> None:
        """Starts it and waits until it holds the model.

        Raises:
            RolloutError: it does not start; with the end of its log.
        """
        self._connection, theirs = self._context.Pipe()
        alive, self._alive = self._context.Pipe(duplex=False)
        self._process = self._context.Process(target=vllm_child.serve, args=(theirs, alive, *self._arguments), name="vllm")
        self._process.start()
        theirs.close()
        alive.close()
        try:
            self._wait("ready", timeout_s, "the start of the rollout engine")
        except (EngineDied, RolloutError) as error:
            self.kill()
            raise RolloutError(f"the rollout engine did not start: {error}. {self.log_tail()}") from None

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
        if self._process is None:
            raise EngineDied(f"{what}: it was ended and does not run")
        try:
            self._connection.send((method, arguments))
        except (BrokenPipeError, ConnectionResetError):
            raise EngineDied(self._why_dead()) from None
        return self._wait("value", timeout_s, what, on_finished)

    def log_tail(self) -> str:
        try:
            return "The end of its log:\n" + "\n".join(self._log_path.read_text(errors="replace").splitlines()[-25:])
        except OSError:
            return "It wrote no log."

    def interrupt(self) -> None:
        """Ends the process, so that a `call` in another thread ends too; `kill` or `start` clears up."""
        if self._process is not None:
            self._process.kill()

    def kill(self) -> None:
        """Ends the process and, with it, its workers: closing our end of the pipe reaches those that a kill does not."""
        if self._process is None:
            return
        self._alive.close()
        self._connection.close()
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None

    def _wait(self, kind: str, timeout_s: float, what: str, on_finished: Callable[[list], None] | None = None) -> Any:
        """The content of the next message of ``kind``; every message counts as a sign of life."""
        while True:
            if not self._connection.poll(timeout_s):
                raise EngineDied(f"{what}: no sign of life for {timeout_s:g} s")
            try:
                found, content = self._connection.recv()
            except (EOFError, ConnectionResetError):
                raise EngineDied(self._why_dead()) from None
            if found == "finished" and on_finished is not None:
                on_finished(content)
            elif found == "error":
                raise RolloutError(f"{what} failed:\n{content}")
            elif found == kind:
                return content

    def _why_dead(self) -> str:
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        return f"the rollout engine's process {self._process.pid} {how}"
