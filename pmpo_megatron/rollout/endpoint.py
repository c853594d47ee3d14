"""An OpenAI-compatible server in front of policies under way, so that a program that knows only a base_url is trained.

It takes POST /v1/chat/completions on 127.0.0.1; the key of a request says which episode it belongs to. Messages become tokens
once, when they are first said: a request has to repeat the conversation so far, and add to it.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout.chat import TemplateError
from pmpo_megatron.rollout.policy import Endpoint, EpisodePolicy, LimitReached

HOST = "127.0.0.1"
NOT_OFFERED = {"stream": (None, False), "n": (None, 1), "logprobs": (None, False)}  # what a request may ask for instead
LARGEST_REQUEST = 64 << 20  # bytes


class _Refused(Exception):
    """A request that is not answered: HTTP status, OpenAI's code, and what would be right."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code = status, code


class EndpointServer:
    """Listens on a free port from the first `open` on, in the event loop that calls it."""

    def __init__(self) -> None:
        self._conversations: dict[str, _Conversation] = {}
        self._runner: web.AppRunner | None = None
        self._starting = asyncio.Lock()

    @asynccontextmanager
    async def open(self, policy: EpisodePolicy) -> AsyncIterator[Endpoint]:
        """Makes ``policy`` reachable with a key of its own."""
        async with self._starting:
            if self._runner is None:
                self._runner = await self._listen()
        [(_, port)] = self._runner.addresses
        key = secrets.token_urlsafe(24)
        self._conversations[key] = _Conversation(policy)
        try:
            yield Endpoint(f"http://{HOST}:{port}/v1", key)
        finally:
            del self._conversations[key]

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _listen(self) -> web.AppRunner:
        app = web.Application(client_max_size=LARGEST_REQUEST)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, HOST, 0).start()
        return runner

    async def _complete(self, request: web.Request) -> web.Response:
        try:
            conversation = self._conversations.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
            if conversation is None:
                raise _Refused(401, "invalid_api_key", "this is not the key of an episode that is under way")
            return web.json_response(await conversation.complete(await request.json()))
        except _Refused as refusal:
            status, code, text = refusal.status, refusal.code, str(refusal)
        except LimitReached as limit:
            status, code, text = 400, "context_length_exceeded", str(limit)
        except RolloutError as error:
            status, code, text = 503, "engine_failed", str(error)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            status, code, text = 400, "invalid_request", f"{type(error).__name__}: {error}"
        except RuntimeError as error:  # the episode is over
            status, code, text = 409, "conflict", str(error)
        return web.json_response({"error": {"message": text, "type": "invalid_request_error", "code": code}}, status=status)


class _Conversation:
    """What a program and the policy have said to each other."""

    def __init__(self, policy: EpisodePolicy) -> None:
        self._policy = policy
        self._said: list[dict[str, Any]] = []
        self._numbers, self._answering = itertools.count(), asyncio.Lock()

    async def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request for a chat completion, both as OpenAI's API has them."""
        for name, values in NOT_OFFERED.items():
            if request.get(name) not in values:
                raise _Refused(400, "unsupported", f"{name} = {request[name]!r} is not offered; leave it out")
        if self._answering.locked():
            raise _Refused(409, "conflict", "another request of this conversation is being answered")
        async with self._answering:
            return await self._answer(request)

    async def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._hear([_plain(message) for message in request["messages"]], request.get("tools"))
        before = len(self._policy.token_ids)
        text = await self._policy.sample(
            stop=request.get("stop") or (), max_tokens=request.get("max_completion_tokens") or request.get("max_tokens")
        )
        self._said.append({"role": "assistant", "content": text})
        after = len(self._policy.token_ids)
        finish_reason = self._policy.finish_reason
        return {
            "id": f"chatcmpl-{next(self._numbers)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request.get("model", "policy"),
            "choices": [{"index": 0, "message": dict(self._said[-1]), "finish_reason": finish_reason, "logprobs": None}],
            "usage": {"prompt_tokens": before, "completion_tokens": after - before, "total_tokens": after},
        }

    def _hear(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None) -> None:
        """Appends what ``messages`` say beyond the conversation so far."""
        known = len(self._said)
        for place, (said, again) in enumerate(zip(self._said, messages, strict=False)):
            if said != again:
                problem = f"messages[{place}] is {str(again)[:80]}, but it was {str(said)[:80]}"
                raise _Refused(400, "history_rewritten", f"{problem}; a conversation is only added to")
        if len(messages) <= known:
            added = f"of {len(messages)} messages all were said before: one has to be added"
            raise _Refused(400, "history_rewritten", added if messages else "messages is empty")
        if known:
            self._policy.tell_messages(messages[known:], tools)
        else:
            self._policy.begin(messages, tools)
        self._said = list(messages)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what is empty, its content as text: so a program may send back what it was given."""
    content = message.get("content")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise _Refused(400, "unsupported", "only text is offered as content")
        content = "".join(part["text"] for part in content)
    return {name: value for name, value in message.items() if value} | {"content": content or ""}
