"""Worker processes that score responses; one that hangs or dies is killed and replaced, and costs its item alone.

Why not a library's pool: pebble 5.2.3 (like multiprocessing and loky) sends results as pickles that the trainer loads, and a
plug-in that returned an object with ``__reduce__``, or wrote a pickle to the pipe, had it executed in rank 0. In its other
tests here workers that are stopped hold the lock of the one pipe that all share, so that no time-out ends them (four items
of 2 s were open after 60 s), and what a plug-in had started outlived its pool.
"""

from __future__ import annotations

import json
import logging
import math
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmpo_megatron.config import to_plain
from pmpo_megatron.errors import ConfigError, PmpoError
from pmpo_megatron.rewards.config import LONGEST_TIMEOUT_S, CodeConfig
from pmpo_megatron.rewards.functions import check_functions
from pmpo_megatron.units import GIB

logger = logging.getLogger(__name__)

HEADER = struct.Struct("<Q")  # bytes of the message that follows
START_TIMEOUT_S = 120.0  # importing sympy on a busy machine
MAX_FAILED_STARTS = 3
MAX_KINDS_OF_ERROR = 20
LARGEST_MESSAGE = 1 << 20  # bytes: scores, and an error's first 500 characters for each function
NOT_FINITE = "a score that is not finite, taken for 0"
Answers = str | Sequence[str]
Item = tuple[str, list[str], Mapping[str, Any]]


@dataclass
class PoolStats:
    """Counts since the pool was made. ``errors`` are exceptions inside a reward function, by text."""

    scored: int = 0
    timeouts: int = 0
    crashes: int = 0
    errors: dict[str, int] = field(default_factory=dict)


class RewardPool:
    """Scores responses with one function, or several, in ``workers`` processes. Threads may share it; their calls take turns.

    Args:
        functions: ``math``, ``boxed``, ``exact``, ``choice``, ``code``, or a plug-in's ``package.module:name``; one or several.
        workers: processes.
        timeout: seconds that one response may take; then its worker is killed, and it scores 0.
        memory_gib: address space of a worker; a response that needs more scores 0.
        evaluated: ``math`` refuses an expression that is still to be evaluated, unless the accepted answer is one.
        code: how ``code`` runs programs.

    Raises:
        ConfigError: a function does not exist, a number is out of range, or ``code`` has no sandbox here.
    """

    def __init__(
        self,
        functions: str | Sequence[str] = "math",
        *,
        workers: int = 2,
        timeout: float = 5.0,
        memory_gib: float = 4.0,
        evaluated: bool = True,
        code: CodeConfig = CodeConfig(),  # noqa: B008  frozen
    ) -> None:
        self.functions = [functions] if isinstance(functions, str) else list(functions)
        if not self.functions:
            raise ConfigError("rewards.functions", "is empty: name at least one")
        if workers < 1 or not timeout > 0 or not memory_gib > 0:
            raise ConfigError("rewards", f"workers {workers}, timeout {timeout} and memory_gib {memory_gib} must be above 0")
        if timeout > LONGEST_TIMEOUT_S:
            raise ConfigError("rewards", f"timeout {timeout} must be at most {LONGEST_TIMEOUT_S:g} s")
        self._takes_metadata = check_functions(self.functions, code)
        self.timeout, self.stats = timeout, PoolStats()
        self._turn = threading.RLock()
        settings = json.dumps({"evaluated": evaluated, "code": to_plain(code)})
        self._workers = [_Worker(self.functions, int(memory_gib * GIB), timeout, settings) for _ in range(workers)]

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, once a call of another thread is through. The pool cannot be used again."""
        with self._turn:
            for worker in self._workers:
                worker.kill()
            self._workers = []

    def score(
        self, responses: Sequence[str], answers: Sequence[Answers], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> list[float]:
        """A score for each response, in order, by the first function; arguments as `score_all`."""
        return [scores[0] for scores in self.score_all(responses, answers, metadata)]

    def score_all(
        self, responses: Sequence[str], answers: Sequence[Answers], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> list[list[float]]:
        """Every function's score of each response, in order.

        Args:
            responses: texts.
            answers: for each response an accepted answer, or a list of which any one is accepted.
            metadata: for each response the further fields of its data row, for functions that take them.

        Raises:
            ValueError: the lists differ in length.
            TypeError: a response or an answer is not text.
            PmpoError: workers do not start, or the pool is closed.
        """
        items = _items(responses, answers, (metadata if self._takes_metadata else None) or [{}] * len(responses))
        with self._turn:
            if not self._workers:
                raise PmpoError("this RewardPool is closed")
            try:
                results = self._run(items)
            except BaseException:
                # Interrupted: what a worker still sends would be taken for the score of an item of the next call.
                for worker in self._workers:
                    if worker.item is not None:
                        worker.restart()
                raise
            self.stats.scored += len(items)
        return results

    def _run(self, items: list[Item]) -> list[list[float]]:
        results: list[list[float]] = [[0.0] * len(self.functions) for _ in items]
        waiting = deque(range(len(items)))
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.results, selectors.EVENT_READ, worker)
            while waiting or any(worker.item is not None for worker in self._workers):
                for worker in self._workers:
                    if worker.ready and worker.item is None and waiting and worker.process.poll() is None:
                        self._give(worker, waiting.popleft(), items)
                for key, _ in selector.select(timeout=self._until_next_deadline()):
                    self._receive(key.data, results, selector)
                for worker in self._workers:
                    if time.monotonic() > worker.deadline:
                        self._replace(worker, selector, timed_out=True)
        return results

    def _until_next_deadline(self) -> float:
        return max(0.0, min(min(worker.deadline for worker in self._workers) - time.monotonic(), 1.0))

    def _give(self, worker: _Worker, index: int, items: Sequence[Item]) -> None:
        worker.item, worker.deadline = index, time.monotonic() + self.timeout
        if not worker.send(items[index]):
            worker.deadline = 0.0  # it does not read: stopped from outside, or a plug-in's thread has hold of it

    def _receive(self, worker: _Worker, results: list[list[float]], selector: selectors.BaseSelector) -> None:
        try:
            message = worker.receive(len(self.functions))
        except EOFError:
            self._replace(worker, selector, timed_out=False)
            return
        if message == "ready":
            worker.ready, worker.failed_starts, worker.deadline = True, 0, float("inf")
        elif message is not None and worker.item is not None:
            results[worker.item] = [self._clean(score) for score in message]
            worker.item, worker.deadline = None, float("inf")

    def _clean(self, score: float | str) -> float:
        error = score if isinstance(score, str) else None if math.isfinite(score) else NOT_FINITE
        if error is not None:
            if error not in self.stats.errors and len(self.stats.errors) >= MAX_KINDS_OF_ERROR:
                error = "other errors"
            if error not in self.stats.errors:
                logger.warning("a reward function of %s: %s (said once, counted)", ", ".join(self.functions), error)
            self.stats.errors[error] = self.stats.errors.get(error, 0) + 1
        return score if error is None and not isinstance(score, str) else 0.0

    def _replace(self, worker: _Worker, selector: selectors.BaseSelector, *, timed_out: bool) -> None:
        """Kills ``worker`` and starts another in its place; the item that it held keeps its 0."""
        if worker.ready:
            self.stats.timeouts += timed_out
            self.stats.crashes += not timed_out
        selector.unregister(worker.results)
        worker.restart()
        if worker.failed_starts > MAX_FAILED_STARTS:
            raise PmpoError(f"reward workers for {', '.join(self.functions)} do not start; see the errors above")
        selector.register(worker.results, selectors.EVENT_READ, worker)


def _items(responses: Sequence[str], answers: Sequence[Answers], metadata: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Responses with their lists of accepted answers; an answer of another type would be wrong without a word."""
    if not len(responses) == len(answers) == len(metadata):
        raise ValueError(f"{len(responses)} responses but {len(answers)} answers and metadata of {len(metadata)}")
    rows: Iterable[tuple[str, Any, Mapping[str, Any]]] = zip(responses, answers, metadata, strict=True)
    items: list[Item] = [(r, list(a) if isinstance(a, (list, tuple)) else [a], dict(m)) for r, a, m in rows]
    for index, (response, accepted, _) in enumerate(items):
        for kind, text in (("response", response), *(("answer", answer) for answer in accepted)):
            if not isinstance(text, str):
                raise TypeError(f"{kind} {index} is not text but {type(text).__name__}: {text!r:.80}")
    return items


class _Worker:
    """One process, what it works on, and until when."""

    def __init__(self, functions: list[str], memory_bytes: int, timeout: float, settings: str) -> None:
        self.timeout = timeout
        arguments = [",".join(functions), str(memory_bytes), str(timeout), settings]
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
        self.item: int | None = None
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self._buffer = b""

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

    def send(self, item: object) -> bool:
        """Hands ``item`` over; False if the worker did not take all of it within its time-out."""
        data = json.dumps(item, default=str).encode()  # Parquet has dates and decimals
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

    def receive(self, count: int) -> list[float | str] | str | None:
        """The next message: "ready", or ``count`` scores or errors; None until it is complete.

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
            return _checked(json.loads(message), count, working=self.item is not None)
        except (ValueError, RecursionError):
            raise EOFError from None


def _checked(message: object, count: int, *, working: bool) -> list[float | str] | str:
    """``message`` if a worker may send it now; else ValueError."""
    if message == "ready" and not working:
        return message
    scores = message if isinstance(message, list) and working else []
    if len(scores) != count or any(type(score) not in (int, float, str) for score in scores):
        raise ValueError
    return scores
