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
import selectors
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pmpo_megatron.config import to_plain
from pmpo_megatron.errors import ConfigError, PmpoError
from pmpo_megatron.rewards.calls import time_limit
from pmpo_megatron.rewards.config import LONGEST_TIMEOUT_S, CodeConfig
from pmpo_megatron.rewards.functions import Kind, check_functions
from pmpo_megatron.rewards.process import Answer, Score, WorkerProcess
from pmpo_megatron.rewards.stats import FunctionStats, PoolStats
from pmpo_megatron.units import GIB

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
MAX_KINDS_OF_ERROR = 20
NOT_FINITE = "a score that is not finite, taken for 0"
Answers = str | Sequence[str]


@dataclass(frozen=True)
class Request:
    """Responses to one prompt that are to be scored.

    ``answers`` is an accepted answer, or a list of which any one is accepted; ``metadata`` the further fields of the data
    row, for functions that take them; ``functions`` those of the pool that score it, None for all.
    """

    responses: Sequence[str]
    answers: Answers
    metadata: Mapping[str, Any] = field(default_factory=dict)
    functions: Sequence[str] | None = None


@dataclass(frozen=True)
class _Job:
    """What a worker does at a time: ``calls`` of one function, each scoring the responses at its place in the results."""

    function: str
    calls: list[tuple[str | Sequence[str], list[str], Mapping[str, Any]]]
    places: list[tuple[int, slice]]  # (number of the request, which of its responses)


class RewardPool:
    """Scores responses with one function, or several, in ``workers`` processes. Threads may share it; their calls take turns.

    Args:
        functions: ``math``, ``boxed``, ``exact``, ``choice``, ``code``, or a plug-in's ``package.module:name``; one or several.
        workers: processes.
        timeout: seconds that a function may take for one response, or one group; then its worker is killed, and it scores 0.
        memory_gib: address space of a worker; a response that needs more scores 0.
        evaluated: ``math`` refuses an expression that is still to be evaluated, unless the accepted answer is one.
        code: how ``code`` runs programs.
        concurrency: calls of one asynchronous function that are under way at once.
        attempts: how often an asynchronous call is made that fails or takes longer than ``timeout``.

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
        concurrency: int = 32,
        attempts: int = 3,
    ) -> None:
        self.functions = [functions] if isinstance(functions, str) else list(functions)
        if not self.functions:
            raise ConfigError("rewards.functions", "is empty: name at least one")
        if workers < 1 or not timeout > 0 or not memory_gib > 0:
            raise ConfigError("rewards", f"workers {workers}, timeout {timeout} and memory_gib {memory_gib} must be above 0")
        if timeout > LONGEST_TIMEOUT_S:
            raise ConfigError("rewards", f"timeout {timeout} must be at most {LONGEST_TIMEOUT_S:g} s")
        if concurrency < 1 or attempts < 1:
            raise ConfigError("rewards", f"concurrency {concurrency} and attempts {attempts} must be at least 1")
        self._kinds = check_functions(self.functions, code)
        self.timeout, self.concurrency, self.attempts = timeout, concurrency, attempts
        self.stats = PoolStats({name: FunctionStats() for name in self.functions})
        self._turn = threading.RLock()
        settings = {"functions": self.functions, "memory_bytes": int(memory_gib * GIB), "timeout": timeout}
        settings |= {"evaluated": evaluated, "code": to_plain(code), "concurrency": concurrency, "attempts": attempts}
        self._workers = [WorkerProcess([json.dumps(settings)]) for _ in range(workers)]

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
        """A score for each response, in order, by the first function; each response has answers and metadata of its own.

        Raises:
            As `score_requests`.
            ValueError: the lists differ in length.
        """
        metadata = metadata or [{}] * len(responses)
        if not len(responses) == len(answers) == len(metadata):
            raise ValueError(f"{len(responses)} responses but {len(answers)} answers and metadata of {len(metadata)}")
        first = self.functions[:1]
        rows = zip(responses, answers, metadata, strict=True)
        return [scores[first[0]][0] for scores in self.score_requests([Request([r], a, m, first) for r, a, m in rows])]

    def score_requests(self, requests: Sequence[Request]) -> list[dict[str, list[float]]]:
        """For each request, in order, the scores of its responses by each of its functions.

        Raises:
            TypeError: a response or an answer is not text.
            PmpoError: workers do not start, or the pool is closed.
        """
        jobs = _make_jobs(requests, self._kinds)
        results = [{name: [0.0] * len(r.responses) for name in r.functions or self.functions} for r in requests]
        with self._turn:
            if not self._workers:
                raise PmpoError("this RewardPool is closed")
            try:
                self._run(jobs, results)
            except BaseException:
                # Interrupted: what a worker still sends would be taken for the score of an item of the next call.
                for worker in self._workers:
                    if worker.job is not None:
                        worker.restart()
                raise
            self.stats.scored += sum(len(request.responses) for request in requests)
        return results

    def _run(self, jobs: Sequence[_Job], results: list[dict[str, list[float]]]) -> None:
        waiting = deque(range(len(jobs)))
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.results, selectors.EVENT_READ, worker)
            while waiting or any(worker.job is not None for worker in self._workers):
                for worker in self._workers:
                    if worker.ready and worker.job is None and waiting and worker.process.poll() is None:
                        self._give(worker, waiting.popleft(), jobs)
                for key, _ in selector.select(timeout=self._until_next_deadline()):
                    self._receive(key.data, jobs, results, selector)
                for worker in self._workers:
                    if time.monotonic() > worker.deadline:
                        self._replace(worker, jobs, selector, timed_out=True)

    def _until_next_deadline(self) -> float:
        return max(0.0, min(min(worker.deadline for worker in self._workers) - time.monotonic(), 1.0))

    def _give(self, worker: WorkerProcess, number: int, jobs: Sequence[_Job]) -> None:
        job, limit = jobs[number], self.timeout
        if self._kinds[job.function].asynchronous:
            limit = time_limit(len(job.calls), self.timeout, self.concurrency, self.attempts)
        worker.begin(number, limit)
        if not worker.send([self.functions.index(job.function), job.calls]):
            worker.deadline = 0.0  # it does not read: stopped from outside, or a plug-in's thread has hold of it

    def _receive(
        self,
        worker: WorkerProcess,
        jobs: Sequence[_Job],
        results: list[dict[str, list[float]]],
        selector: selectors.BaseSelector,
    ) -> None:
        try:
            message = worker.receive(0 if worker.job is None else len(jobs[worker.job].calls))
        except EOFError:
            self._replace(worker, jobs, selector, timed_out=False)
            return
        if message == "ready":
            worker.ready, worker.failed_starts, worker.deadline = True, 0, float("inf")
        elif isinstance(message, Answer) and worker.job is not None:
            self._take(message, jobs[worker.job], results)
            worker.job, worker.deadline = None, float("inf")

    def _take(self, answer: Answer, job: _Job, results: list[dict[str, list[float]]]) -> None:
        stats = self.stats.functions[job.function]
        stats.calls += len(job.calls)
        stats.seconds += answer.seconds
        stats.retries += answer.retries
        stats.timeouts += answer.timeouts
        for (number, members), scores in zip(job.places, answer.scores, strict=True):
            given = results[number][job.function]
            given[members] = self._clean(scores, job.function, len(given[members]))

    def _clean(self, scores: Score, function: str, count: int) -> list[float]:
        """``count`` scores; zeros for an error, and for each that is not finite."""
        if isinstance(scores, str):
            self._count_error(scores, function)
            return [0.0] * count
        values = scores if isinstance(scores, list) else [scores]
        if len(values) != count:
            self._count_error(f"{len(values)} scores for {count} responses", function)
            return [0.0] * count
        for value in values:
            if not math.isfinite(value):
                self._count_error(NOT_FINITE, function)
        return [value if math.isfinite(value) else 0.0 for value in values]

    def _count_error(self, error: str, function: str) -> None:
        errors = self.stats.functions[function].errors
        if error not in errors and len(errors) >= MAX_KINDS_OF_ERROR:
            error = "other errors"
        if error not in errors:
            logger.warning("reward function %s: %s (said once, counted)", function, error)
        errors[error] = errors.get(error, 0) + 1

    def _replace(
        self, worker: WorkerProcess, jobs: Sequence[_Job], selector: selectors.BaseSelector, *, timed_out: bool
    ) -> None:
        """Kills ``worker`` and starts another in its place; what it was to score keeps its 0."""
        if worker.ready and worker.job is not None:
            job = jobs[worker.job]
            stats = self.stats.functions[job.function]
            stats.calls += len(job.calls)
            stats.seconds += time.monotonic() - worker.began
            stats.timeouts += timed_out
            stats.crashes += not timed_out
        selector.unregister(worker.results)
        worker.restart()
        if worker.failed_starts > MAX_FAILED_STARTS:
            raise PmpoError(f"reward workers for {', '.join(self.functions)} do not start; see the errors above")
        selector.register(worker.results, selectors.EVENT_READ, worker)


def _make_jobs(requests: Sequence[Request], kinds: Mapping[str, Kind]) -> list[_Job]:
    """Asynchronous functions first, each with all its calls in one job, so that one process keeps to its concurrency."""
    together: dict[str, _Job] = {}
    single: list[_Job] = []
    for number, request in enumerate(requests):
        answers = _checked_answers(number, request)
        for name in request.functions or kinds:
            metadata = dict(request.metadata) if kinds[name].metadata else {}
            for responses, members in _calls(request.responses, group=kinds[name].group):
                call, place = (responses, answers, metadata), (number, members)
                if kinds[name].asynchronous:
                    job = together.setdefault(name, _Job(name, [], []))
                    job.calls.append(call)
                    job.places.append(place)
                else:
                    single.append(_Job(name, [call], [place]))
    return [*together.values(), *single]


def _calls(responses: Sequence[str], *, group: bool) -> Iterator[tuple[str | Sequence[str], slice]]:
    """What a function is called with, and which of the responses it scores."""
    if group:
        yield list(responses), slice(0, len(responses))
        return
    for place, response in enumerate(responses):
        yield response, slice(place, place + 1)


def _checked_answers(number: int, request: Request) -> list[str]:
    """The list of accepted answers; a text of another type would be scored wrongly without a word."""
    answers: list[Any] = list(request.answers) if isinstance(request.answers, (list, tuple)) else [request.answers]
    for kind, texts in (("response", request.responses), ("answer", answers)):
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"{kind} {number} is not text but {type(text).__name__}: {text!r:.80}")
    return answers
