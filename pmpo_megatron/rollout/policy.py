"""The policy as an episode sees it. It owns every token of the trajectory and only ever appends: nothing is tokenised again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pmpo_megatron.rollout.chat import ChatTokenizer, Message
from pmpo_megatron.rollout.config import EpisodeConfig, SamplingConfig
from pmpo_megatron.rollout.vllm_jobs import Job
from pmpo_megatron.types import Episode, Prompt, Rollout, TokenIds

NO_VERSION = -1  # of tokens that no weights made


class LimitReached(Exception):
    """An episode may not go on. ``which`` limit: turns, tokens or seconds."""

    def __init__(self, which: str, text: str) -> None:
        super().__init__(text)
        self.which = which


@dataclass(frozen=True)
class Outcome:
    """What an episode may return instead of a number.

    Attributes:
        reward: any finite number; None: the run's reward functions score the trajectory's text.
        correct: counts for held-out accuracy; None: whether the reward is at least 0.5.
        metrics: logged as ``episode/<name>``, their mean over episodes.
    """

    reward: float | None
    correct: bool | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (*self.metrics.values(), *(() if self.reward is None else (self.reward,))):
            if isinstance(value, str) or not math.isfinite(float(value)):
                raise ValueError(f"an episode's reward and metrics are finite numbers, not {value!r}")


@dataclass(frozen=True, eq=False)
class Endpoint:
    """Where a program finds the policy as an OpenAI-compatible server."""

    base_url: str
    api_key: str


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What all episodes share.

    ``longest_prompt`` is that of the data: so much room a conversation's opening has. ``open_endpoint`` makes a policy
    reachable over HTTP.
    """

    config: EpisodeConfig
    tokenizer: ChatTokenizer
    longest_prompt: int
    open_endpoint: Callable[[EpisodePolicy], AbstractAsyncContextManager[Endpoint]]


class EpisodePolicy:
    """One trajectory under way. An episode calls `sample`, `tell` and what stands beside them.

    Args:
        prompt: what it begins with.
        sampling: of the run; every turn is sampled by it.
        seed_of: the seed of a turn, by its number.
        ask: has the engine answer a job.
        version: of the engine's weights now.
        home: number of the engine that holds the trajectory's keys and values; None: any.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampling: SamplingConfig,
        surroundings: Surroundings,
        *,
        seed_of: Callable[[int], int],
        ask: Callable[[Job], Awaitable[Rollout]],
        version: int,
        home: int | None,
    ) -> None:
        self.prompt, self._sampling, self._surroundings = prompt, sampling, surroundings
        self._seed_of, self._ask, self._version, self._home = seed_of, ask, version, home
        self._prompt_ids = prompt.token_ids
        self._longest = max(len(prompt.token_ids), surroundings.longest_prompt) + sampling.max_tokens
        self._parts: list[Rollout | TokenIds] = []  # turns, and what was told between them
        self._job: Job | None = None  # under way
        self._truncated = self._closed = False
        self._cached = self._asked = 0
        self.clock: asyncio.Timeout | None = None  # of the episode's own time

    async def sample(self, *, stop: str | Sequence[str] = (), max_tokens: int | None = None) -> str:
        """The policy's next turn. Its tokens are appended, and their text is returned.

        Args:
            stop: texts that end the turn, beside ``sampling.stop``; they are kept, up to the end of the token that ends them.
            max_tokens: of this turn at most.

        Raises:
            LimitReached: no turn or no token is left.
        """
        self._check_open()
        if self.turns >= self._surroundings.config.max_turns:
            raise LimitReached("turns", f"episode.max_turns = {self.turns} turns were sampled")
        self._need_room(1)
        room, token_ids = self.room, self.token_ids
        sampling = replace(
            self._sampling,
            samples_per_prompt=1,
            max_tokens=room if max_tokens is None else min(room, max_tokens),
            stop=(*self._sampling.stop, *([stop] if isinstance(stop, str) else stop)),
        )
        seeds = [self._seed_of(self.turns)]
        turn = await self._answer(Job(replace(self.prompt, token_ids=token_ids), sampling, seeds, self._home))
        if self.turns:
            self._cached, self._asked = self._cached + turn.cached, self._asked + len(token_ids)
        self._parts.append(turn)
        self._truncated = turn.finish_reason == "length" and self.room == 0
        return self._surroundings.tokenizer.decode(turn.token_ids)

    def tell(self, said: str | Sequence[int]) -> None:
        """Appends a text, tokenised by itself, or token ids. They are context alone: no gradient, no p, no length.

        Raises:
            LimitReached: there is no room for all of it; nothing is appended.
            ValueError: a token is not one of the model's.
        """
        self._check_open()
        self._append(self._surroundings.tokenizer.encode(said))

    def tell_messages(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> None:
        """Appends chat messages, such as a tool's answer, and the beginning of the assistant's next turn.

        Raises:
            LimitReached: there is no room; nothing is appended.
            TemplateError: the model's chat template does not append such messages to what was said.
        """
        self._check_open()
        last = int(self._parts[-1].token_ids[-1]) if self._parts and isinstance(self._parts[-1], Rollout) else None
        self._append(self._surroundings.tokenizer.between(last, messages, tools))

    def begin(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> None:
        """Begins with ``messages`` instead of the data's prompt; before anything was sampled or told.

        Raises:
            LimitReached: they are longer than the prompts of the data may be.
            TemplateError: the model's chat template cannot render them.
        """
        self._check_open()
        if self._parts:
            raise RuntimeError("the conversation has begun; what follows is told")
        opening, limit = self._surroundings.tokenizer.opening(messages, tools), self._longest - self._sampling.max_tokens
        if len(opening) > limit:
            raise LimitReached("tokens", f"the messages have {len(opening)} tokens, data.max_prompt_tokens allows {limit}")
        self._prompt_ids = opening

    def endpoint(self) -> AbstractAsyncContextManager[Endpoint]:
        """An OpenAI-compatible server of this conversation on 127.0.0.1, with a key of its own, as long as it is entered."""
        self._check_open()
        return self._surroundings.open_endpoint(self)

    @property
    def token_ids(self) -> TokenIds:
        """Everything so far, int32: the prompt, and what was sampled and told."""
        return np.concatenate([self._prompt_ids, *map(_ids, self._parts)])

    @property
    def text(self) -> str:
        """All that was sampled and told since the prompt."""
        return self._surroundings.tokenizer.decode(self.token_ids[len(self._prompt_ids) :])

    @property
    def turns(self) -> int:
        """How often was sampled."""
        return sum(isinstance(part, Rollout) for part in self._parts)

    @property
    def room(self) -> int:
        """How many tokens may still be sampled or told."""
        return self._sampling.max_tokens - sum(len(_ids(part)) for part in self._parts)

    @property
    def finish_reason(self) -> str:
        """Why the last turn ended: stop or length; '' before the first."""
        return next((part.finish_reason for part in reversed(self._parts) if isinstance(part, Rollout)), "")

    def finish(self, outcome: Outcome, failure: str) -> Rollout:
        """The trajectory, to which nothing can be added any more. ``failure`` is the kind of what ended it, or ''."""
        self._closed = True
        if self._job is not None:
            self._job.future.cancel()
        text, parts = self.text, self._parts
        sampled = [np.full(len(_ids(part)), isinstance(part, Rollout)) for part in parts]
        log_probs = [part.log_probs if isinstance(part, Rollout) else np.zeros(len(part), np.float32) for part in parts]
        versions = [part.versions if isinstance(part, Rollout) else np.full(len(part), NO_VERSION, np.int32) for part in parts]
        made_by = [part.policy_version for part in parts if isinstance(part, Rollout)]
        episode = Episode(
            prompt_ids=self._prompt_ids,
            sampled=np.concatenate([*sampled, np.empty(0, np.bool_)]),
            reward=None if outcome.reward is None else float(outcome.reward),
            correct=outcome.correct,
            turns=self.turns,
            version=min(made_by, default=self._version),
            cached=self._cached,
            asked=self._asked,
            failure=failure,
            metrics=dict(outcome.metrics),
        )
        return Rollout(
            token_ids=np.concatenate([*map(_ids, parts), np.empty(0, np.int32)]),
            log_probs=np.concatenate([*log_probs, np.empty(0, np.float32)]),
            text=text,
            finish_reason="length" if self._truncated else "stop",
            versions=np.concatenate([*versions, np.empty(0, np.int32)]),
            seed=self._seed_of(0),
            episode=episode,
        )

    async def _answer(self, job: Job) -> Rollout:
        self._job = job
        try:
            with self._clock_stopped():
                turn = await self._ask(job)
        except asyncio.CancelledError:
            if self._closed:
                raise RuntimeError("the episode is over") from None
            raise
        finally:
            self._job = None
        self._home = job.home
        return turn

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """The engine's time is not the episode's."""
        clock, now = self.clock, asyncio.get_running_loop().time
        assert clock is not None and (end := clock.when()) is not None, "an episode has a clock, and samples turn by turn"
        left = end - now()
        clock.reschedule(None)
        try:
            yield
        finally:
            if not self._closed:
                clock.reschedule(now() + left)

    def _append(self, token_ids: TokenIds) -> None:
        self._need_room(len(token_ids))
        if len(token_ids):
            self._parts.append(token_ids)

    def _need_room(self, tokens: int) -> None:
        if tokens > self.room:
            self._truncated = True
            raise LimitReached("tokens", f"{tokens} more tokens, but {self.room} of sampling.max_tokens are left")

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the episode is over")
        if self._job is not None:
            raise RuntimeError("policy.sample is under way; turns come one after another")


def _ids(part: Rollout | TokenIds) -> TokenIds:
    return part.token_ids if isinstance(part, Rollout) else part
