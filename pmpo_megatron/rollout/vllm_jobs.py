"""What a vLLM is asked: one job for each prompt with all its responses, one request for each response."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.types import Prompt, Rollout, RolloutGroup, Routes

_numbers = itertools.count()


class Job:
    """Responses to one prompt, one for each of ``seeds``; ``future`` has them when all have come.

    ``home`` is the number of the engine, modulo how many there are, that should answer, or was asked last; None: any.
    """

    def __init__(self, prompt: Prompt, sampling: SamplingConfig, seeds: Sequence[int], home: int | None = None) -> None:
        self.prompt, self.sampling, self.seeds, self.home = prompt, sampling, seeds, home
        self.number = next(_numbers)
        self.future: Future[RolloutGroup] = Future()
        self._rollouts: dict[int, Rollout] = {}

    def requests(self, samples: Iterable[int]) -> tuple[np.ndarray, list[tuple[str, int]]]:
        """The prompt's token ids, int32, and the (name, seed) of each response."""
        names = [(f"{self.number}/{sample}", self.seeds[sample]) for sample in samples]
        return self.prompt.token_ids, names

    def take(
        self,
        name: str,
        token_ids: np.ndarray,
        log_probs: np.ndarray,
        text: str,
        reason: str,
        spans: Sequence[tuple[int, int]],
        cached: int,
        routes: Routes | None,
    ) -> bool:
        """A response, as `vllm_child` sends it; whether it was the last."""
        sample = int(name.partition("/")[2])
        versions = np.repeat(*np.array(spans, dtype=np.int32).reshape(-1, 2).T)
        seed = self.seeds[sample]
        self._rollouts[sample] = Rollout(token_ids, log_probs, text, reason, versions, seed, routes=routes, cached=cached)
        if len(self._rollouts) < len(self.seeds):
            return False
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(RolloutGroup(self.prompt, tuple(self._rollouts[n] for n in sorted(self._rollouts))))
        return True

    def missing(self, samples: Iterable[int]) -> list[int]:
        return sorted(set(samples) - self._rollouts.keys())

    def fail(self, error: RolloutError) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def make_jobs(prompts: Sequence[Prompt], sampling: SamplingConfig, round_index: int, *, divided: bool) -> list[Job]:
    """All responses to every prompt; if they are ``divided``, prompt k has engine k for its home."""

    def seeds(prompt: Prompt) -> list[int]:
        return [request_seed(sampling, round_index, prompt.index, k) for k in range(sampling.samples_per_prompt)]

    return [Job(prompt, sampling, seeds(prompt), k if divided else None) for k, prompt in enumerate(prompts)]


def request_seed(sampling: SamplingConfig, round_index: int, prompt_index: int, sample: int, turn: int = 0) -> int:
    """Seed of one request: depends on these five alone, so neither on the batch nor on what failed before."""
    text = f"{sampling.seed}/{round_index}/{prompt_index}/{sample}" + (f"/{turn}" if turn else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


Part = tuple[Job, Sequence[int]]  # some of a job's responses
Batches = list[tuple[dict[str, Any], list[tuple[np.ndarray, list[tuple[str, int]]]]]]  # parameters; ids, (name, seed) of each


def job_number(name: str) -> int:
    """Of the job that a request belongs to."""
    return int(name.partition("/")[0])


def missing_parts(names: Iterable[str], jobs: Mapping[int, Job]) -> list[Part]:
    """What of the requests ``names`` is still wanted, in the order of the jobs."""
    samples: dict[int, list[int]] = {}
    for name in names:
        samples.setdefault(job_number(name), []).append(int(name.partition("/")[2]))
    parts = [(jobs[number], jobs[number].missing(samples[number])) for number in sorted(samples) if number in jobs]
    return [part for part in parts if part[1]]


def divide(parts: Sequence[Part], engines: int) -> list[list[Part]]:
    """To each engine what has it for its home."""
    return [[part for part in parts if (part[0].home or 0) % engines == number] for number in range(engines)]


def batches(parts: Sequence[Part]) -> Batches:
    """``parts`` as one message has them: neighbours of the same sampling together."""
    alike = itertools.groupby(parts, key=lambda part: part[0].sampling)
    return [(request_parameters(sampling), [job.requests(k) for job, k in same]) for sampling, same in alike]


def request_parameters(sampling: SamplingConfig) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams that all responses have in common; each has a seed of its own."""
    return dict(
        n=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        logprobs=0,
        flat_logprobs=True,  # one list of numbers instead of a dictionary for each token
        include_stop_str_in_output=True,
        skip_special_tokens=True,
    )
