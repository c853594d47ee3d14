"""vLLM servers that somebody else started, by URL: on other nodes, for one run at a time. Token ids in, token ids out.

A server must be started with our worker extension, so that weights can be pushed into it, and with log-probs of the
distribution that is sampled from:

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.launchers.api_server.entry --model MODEL --enable-scale-out \\
        --logprobs-mode processed_logprobs --worker-extension-cls pmpo_megatron.bridge.vllm_worker.WeightReceiver
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.vllm_engine import make_requests
from pmpo_megatron.types import Prompt, Rollout, RolloutGroup, to_token_ids

logger = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FIRST_PAUSE_S = 0.5  # between attempts; doubles


class ServerEngine:
    """`RolloutEngine` on running servers; requests go to them in turn. See `engine.RolloutEngine` for the methods.

    Raises:
        RolloutError: a server does not answer after ``server_attempts`` attempts, or was not started as it must be.
    """

    holds_weights = True
    same_host = elsewhere = False

    def __init__(self, config: RolloutConfig) -> None:
        self.config, self.version = config, 0
        self.broken: str | None = None
        self.urls = [url.rstrip("/") for url in config.urls]
        self.on_loopback = all(urlsplit(url).hostname in LOOPBACK for url in self.urls)
        self.on_restart: Callable[[ServerEngine], None] | None = None
        for url, workers in zip(self.urls, asyncio.run(self._everywhere("pmpo_describe", ())), strict=True):
            for worker in workers:
                if worker["logprobs_mode"] != "processed_logprobs":
                    raise RolloutError(
                        f"{url}: was started with --logprobs-mode {worker['logprobs_mode']}, not processed_logprobs"
                    )

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        if self.broken is not None:
            raise RolloutError(f"the servers' weights are not whole ({self.broken}); a full update must succeed first")
        self._bring_up_to_date()
        requests = make_requests(prompts, sampling, round_index)
        answers = iter(asyncio.run(self._generate(requests)))
        seeds = iter(request[2]["seed"] for request in requests)
        return [
            RolloutGroup(prompt, tuple(self._rollout(next(answers), next(seeds)) for _ in range(sampling.samples_per_prompt)))
            for prompt in prompts
        ]

    def collective_rpc(self, method: str, *arguments: Any) -> list[Any]:
        return [worker for workers in asyncio.run(self._everywhere(method, arguments)) for worker in workers]

    def reset_prefix_cache(self) -> None:
        asyncio.run(self._post_everywhere("/reset_prefix_cache", {}))

    def mark_broken(self, reason: str | None) -> None:
        self.broken = reason

    def revive(self) -> None:
        raise RolloutError("servers are not started by the trainer; start them again and give the same command")

    def close(self) -> None:
        """The servers go on: they are not ours."""

    def _bring_up_to_date(self) -> None:
        """A server that was started again has its checkpoint's weights, and says so."""
        if self.on_restart is None or not self.version:
            return
        held = {worker["version"] for worker in self.collective_rpc("pmpo_describe")}
        if held != {self.version}:
            logger.warning("servers hold weights of versions %s instead of %d: sending them again", sorted(held), self.version)
            self.on_restart(self)

    def _rollout(self, choice: dict[str, Any], seed: int) -> Rollout:
        try:
            token_ids = to_token_ids(choice["token_ids"])
        except ValueError as error:
            raise RolloutError(f"a server returned something else: {error}") from None
        log_probs = np.array([token["logprob"] for token in choice["logprobs"]["content"]], dtype=np.float32)
        if len(log_probs) != len(token_ids):
            raise RolloutError(f"a server returned {len(log_probs)} log-probs for {len(token_ids)} tokens")
        return Rollout(token_ids, log_probs, choice["text"], choice["finish_reason"], self.version, seed)

    async def _generate(self, requests: list[tuple[str, list[int], dict]]) -> list[dict[str, Any]]:
        limits = [asyncio.Semaphore(self.config.max_num_seqs) for _ in self.urls]

        async def one(session: aiohttp.ClientSession, number: int, token_ids: list[int], parameters: dict) -> dict[str, Any]:
            where = number % len(self.urls)
            body = {"token_ids": token_ids, "sampling_params": parameters, "output_mode": "text"}
            async with limits[where]:
                answer = await self._post(session, self.urls[where] + "/inference/v1/generate", body)
            return answer["choices"][0]

        async with self._session() as session:
            calls = [one(session, n, token_ids, parameters) for n, (_, token_ids, parameters) in enumerate(requests)]
            return await asyncio.gather(*calls)

    async def _everywhere(self, method: str, arguments: tuple) -> list[list[Any]]:
        answers = await self._post_everywhere("/collective_rpc", {"method": method, "args": list(arguments)})
        return [answer["results"] for answer in answers]

    async def _post_everywhere(self, route: str, body: dict[str, Any]) -> list[Any]:
        async with self._session() as session:
            return await asyncio.gather(*(self._post(session, url + route, body) for url in self.urls))

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=self.config.start_timeout_s)
        return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))

    async def _post(self, session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
        """The JSON answer. Connections that fail are tried again; an answer that says no is not.

        A request that failed in the middle is repeated as a whole: its seed gives the same response.
        """
        pause, problem = FIRST_PAUSE_S, ""
        for attempt in range(self.config.server_attempts):
            if attempt:
                await asyncio.sleep(pause)
                pause *= 2
            try:
                async with session.post(url, json=body) as response:
                    if response.status < 400:
                        text = await response.text()
                        return await response.json() if text else None
                    problem = f"status {response.status}: {(await response.text())[:300]}"
                    if response.status == 404:
                        problem += " (was it started with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out?)"
                    if response.status < 500:
                        break
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                problem = str(error) or type(error).__name__
        raise RolloutError(f"{url}: {problem}; gave up after {attempt + 1} attempts")
