"""Episodes: a function of the user's own plays each trajectory, turn by turn, with the engine that makes the turns.

Episodes are asyncio tasks in a thread of rank 0, beside the threads that talk to the vLLMs: while one waits for a tool, the
others are sampled.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from types import CodeType
from typing import Any

from pmpo_megatron.config import import_named
from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.errors import ConfigError, RolloutError
from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.rollout.chat import ChatTokenizer, TemplateError
from pmpo_megatron.rollout.config import EpisodeConfig, SamplingConfig
from pmpo_megatron.rollout.endpoint import EndpointServer
from pmpo_megatron.rollout.engine import EngineAround, RolloutEngine
from pmpo_megatron.rollout.policy import EpisodePolicy, LimitReached, Outcome, Surroundings
from pmpo_megatron.rollout.vllm_jobs import Job, request_seed
from pmpo_megatron.types import Prompt, Rollout, RolloutGroup

logger = logging.getLogger(__name__)
MAX_KINDS = 20  # of failures that are told apart
CLOSE_S = 5.0
BLOCKED_S = 10.0
EpisodeFunction = Callable[[Prompt, EpisodePolicy], Awaitable[Any]]


def find_episode(name: str) -> EpisodeFunction:
    """The function that ``name``, ``package.module:name``, stands for.

    Raises:
        ConfigError: it cannot be imported, is not async, or does not take a prompt and a policy.
    """
    function = import_named("episode.function", name)
    if not any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None)))):  # noqa: B004
        raise ConfigError("episode.function", f"{name!r} must be an async def episode(prompt, policy)")
    try:
        inspect.signature(function).bind("prompt", "policy")
    except TypeError as error:
        raise ConfigError("episode.function", f"{name!r} must be a function of (prompt, policy): {error}") from None
    return function


class EpisodeEngine(EngineAround):
    """An engine whose rollouts are trajectories of episodes; their turns come from the ``engine`` inside.

    Args:
        divided: turns of a round are asked for together, when every episode that goes on waits for one, so that the engine's
            batches, and with them every bit of a round, depend on the episodes alone. Else each is asked for as it comes.
        longest_prompt: tokens of the data's prompts at most.
    """

    def __init__(
        self, engine: RolloutEngine, config: EpisodeConfig, *, model_path: str, longest_prompt: int, divided: bool
    ) -> None:
        super().__init__(engine)
        assert config.function is not None, "there are episodes"
        self._config, self._divided = config, divided
        self._function = find_episode(config.function)
        self._server = EndpointServer()
        tokenizer = ChatTokenizer(load_tokenizer(model_path), vocab_size=read_shape(model_path).vocab_size)
        self._surroundings = Surroundings(config, tokenizer, longest_prompt, self._server.open)
        self._failures: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="episodes")
        self._thread.start()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="episodes-watch").start()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        episodes = len(prompts) * sampling.samples_per_prompt
        turns = _Turns(self._engine, episodes if self._divided else None)
        groups = [self._start(prompt, sampling, round_index, turns, place) for place, prompt in enumerate(prompts)]
        try:
            return [group.result() for group in groups]
        except BaseException:
            for group in groups:
                group.cancel()
            raise

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[Future[RolloutGroup]]:
        turns = _Turns(self._engine, None)
        return [self._start(prompt, sampling, round_index, turns, place) for place, prompt in enumerate(prompts)]

    def close(self) -> None:
        self._closed.set()
        self._engine.close()
        with contextlib.suppress(TimeoutError):  # an episode that blocks the loop ends with the process
            asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result(CLOSE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_S)
            self._loop.close()

    async def _end_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._server.close()

    def _watch(self) -> None:
        """Says which line of an episode holds up all others, because it does not give way to them."""
        while not self._closed.wait(BLOCKED_S):
            moved = threading.Event()
            self._loop.call_soon_threadsafe(moved.set)
            if not moved.wait(BLOCKED_S) and not self._closed.is_set():
                stack = traceback.extract_stack(sys._current_frames()[self._thread.ident or 0])
                where = _line_in(self._code, stack)
                logger.warning("no episode has moved for %g s: %s does not await; asyncio.to_thread helps", BLOCKED_S, where)

    @property
    def _code(self) -> CodeType:
        function: Any = self._function
        return function.__code__ if hasattr(function, "__code__") else type(function).__call__.__code__

    def _start(
        self, prompt: Prompt, sampling: SamplingConfig, round_index: int, turns: _Turns, place: int
    ) -> Future[RolloutGroup]:
        return asyncio.run_coroutine_threadsafe(self._group(prompt, sampling, round_index, turns, place), self._loop)

    async def _group(
        self, prompt: Prompt, sampling: SamplingConfig, round_index: int, turns: _Turns, place: int
    ) -> RolloutGroup:
        def policy(sample: int) -> EpisodePolicy:
            return EpisodePolicy(
                prompt,
                sampling,
                self._surroundings,
                seed_of=partial(request_seed, sampling, round_index, prompt.index, sample),
                ask=partial(turns.ask, (place, sample)),
                version=self._engine.version,
                home=place if turns.together else None,
            )

        episodes = [asyncio.create_task(self._episode(policy(k), turns)) for k in range(sampling.samples_per_prompt)]
        try:
            return RolloutGroup(prompt, tuple(await asyncio.gather(*episodes)))
        finally:
            for episode in episodes:
                episode.cancel()

    async def _episode(self, policy: EpisodePolicy, turns: _Turns) -> Rollout:
        try:
            outcome, failure = await self._play(policy)
            return policy.finish(outcome, failure)
        finally:
            turns.ended()

    async def _play(self, policy: EpisodePolicy) -> tuple[Outcome, str]:
        """What the user's function returned; where it raised or took too long, nothing, and the kind of its failure."""
        try:
            async with asyncio.timeout(self._config.timeout_s) as policy.clock:
                value = await self._function(policy.prompt, policy)
                return value if isinstance(value, Outcome) else Outcome(value), ""
        except (RolloutError, TemplateError):
            raise  # no episode could go on
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return Outcome(0.0), self._failed("CancelledError", error)
        except LimitReached as error:
            return Outcome(0.0), self._failed(error.which, error)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            expired = policy.clock is not None and policy.clock.expired()
            return Outcome(0.0), self._failed("seconds" if expired else type(error).__name__, error)

    def _failed(self, kind: str, error: BaseException) -> str:
        """The kind by which the failure is counted; the first of each is said."""
        if kind not in self._failures and len(self._failures) >= MAX_KINDS:
            kind = "other"
        if kind not in self._failures:
            self._failures.add(kind)
            text = f"{type(error).__name__}: {error}"[:500]
            frames = [f for each in (error.__cause__, error) if each for f in traceback.extract_tb(each.__traceback__)]
            where = _line_in(self._code, frames)  # where time ran out, the cause
            logger.warning("an episode failed by %s: %s (%s); it scores 0 (said once)", kind, text, where)
        return kind


def _line_in(code: CodeType, frames: Sequence[traceback.FrameSummary]) -> str:
    """The last of ``frames`` that is in the file of ``code``; without any, its first line."""
    lines = [frame.lineno for frame in frames if frame.filename == code.co_filename]
    return f"{code.co_filename}:{lines[-1] if lines else code.co_firstlineno}"


class _Turns:
    """Hands turns to the engine: each as it comes, or those of all ``episodes`` together, once every open one waits for one."""

    def __init__(self, engine: RolloutEngine, episodes: int | None) -> None:
        self._engine, self._open = engine, episodes or 0
        self.together = episodes is not None
        self._waiting: list[tuple[tuple[int, int], Job]] = []

    async def ask(self, order: tuple[int, int], job: Job) -> Rollout:
        """The one response to ``job``; ``order`` is its episode's place in the round: prompt, sample."""
        self._waiting.append((order, job))
        self._send()
        group = await asyncio.wrap_future(job.future)
        return group.rollouts[0]

    def ended(self) -> None:
        """An episode asks for no more turns."""
        self._open -= 1
        self._send()

    def _send(self) -> None:
        waiting = sorted((entry for entry in self._waiting if not entry[1].future.cancelled()), key=lambda entry: entry[0])
        if not waiting or (self.together and len(waiting) < self._open):
            return
        self._waiting, jobs = [], [job for _, job in waiting]
        try:
            self._engine.ask(jobs, divided=self.together)
        except RolloutError as error:
            for job in jobs:
                job.fail(error)
