"""Problems become recorded responses: chunk after chunk is generated, scored and written, and nothing is done twice."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from pmpo_megatron.benchmarks.records import TOO_LONG, BenchmarkRecords, Record, Response
from pmpo_megatron.benchmarks.sources import Benchmark
from pmpo_megatron.benchmarks.statistics import accuracy
from pmpo_megatron.monitor.progress import Pace, format_count, format_seconds
from pmpo_megatron.rewards import RewardScorer, ScoredGroup, score_groups
from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.rollout.engine import RolloutEngine
from pmpo_megatron.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One benchmark for one model."""

    benchmark: Benchmark
    prompts: tuple[Prompt, ...]
    records: BenchmarkRecords

    @property
    def number(self) -> int:
        """Stands in for a round's number, so that every benchmark has random streams of its own, whatever else is evaluated."""
        return zlib.crc32(self.benchmark.name.encode()) & 0x7FFFFFFF


class Progress:
    """A line after every chunk: how far, how good, how fast, how long still."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._pace = Pace(total_steps=total, first_step=0)
        self._last = time.monotonic()

    def skip(self, problems: int) -> None:
        self._done += problems

    def show(self, task: Task, problems: int, tokens: int) -> None:
        self._done += problems
        self._pace.advance(self._done)
        now = time.monotonic()
        records, left = task.records.records, self._pace.seconds_left
        parts = [f"{task.benchmark.name} {len(records)}/{len(task.prompts)} problems"]
        parts.append(f"accuracy {accuracy([record.scores for record in records]).percent()}")
        parts.append(f"{format_count(tokens / max(now - self._last, 1e-9))} tok/s")
        if left is not None and self._done < self._total:
            parts.append(f"{format_seconds(left)} left")
        logger.info("%s", "  ".join(parts))
        self._last = now


def run_tasks(
    tasks: Sequence[Task],
    engine: RolloutEngine,
    scorer: RewardScorer,
    *,
    sampling: SamplingConfig,
    max_length: int | None,
    chunk: int,
) -> None:
    """Answers and scores whatever is missing of ``tasks``.

    Args:
        max_length: tokens of prompt and response together; a prompt that leaves no room for a response counts as failed.
        chunk: problems that are generated together and then recorded.

    Raises:
        RolloutError: the engine failed beyond repair; what was recorded before stays.
    """
    progress = Progress(sum(len(task.records.missing) for task in tasks))
    for task in tasks:
        missing = task.records.missing
        limit = math.inf if max_length is None else max_length
        fitting = [prompt for prompt in missing if len(prompt.token_ids) < limit]
        _fail_too_long(task, [prompt for prompt in missing if len(prompt.token_ids) >= limit], sampling.samples_per_prompt)
        progress.skip(len(missing) - len(fitting))
        _say_if_cut(task, fitting, sampling, max_length)
        for start in range(0, len(fitting), chunk):
            groups = engine.generate(fitting[start : start + chunk], sampling, round_index=task.number)
            for scored in score_groups(groups, scorer):
                task.records.append(_record(scored))
            tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
            progress.show(task, len(groups), tokens)


def _fail_too_long(task: Task, prompts: Sequence[Prompt], samples: int) -> None:
    """A problem that is left out would raise the accuracy: it counts as failed, and says why."""
    for prompt in prompts:
        responses = (Response("", 0.0, TOO_LONG, 0),) * samples
        task.records.append(Record(prompt.index, prompt.text, prompt.answers, len(prompt.token_ids), responses))
    if prompts:
        logger.warning(
            "%s: %d prompts are longer than the model allows; they count as failed", task.benchmark.name, len(prompts)
        )


def _say_if_cut(task: Task, prompts: Sequence[Prompt], sampling: SamplingConfig, max_length: int | None) -> None:
    cut = sum(max_length is not None and len(prompt.token_ids) + sampling.max_tokens > max_length for prompt in prompts)
    if cut:
        said = "%s: %d of %d prompts leave less than %d tokens for the response within the model's %d"
        logger.warning(said, task.benchmark.name, cut, len(prompts), sampling.max_tokens, max_length)


def _record(scored: ScoredGroup) -> Record:
    prompt = scored.group.prompt
    responses = tuple(
        Response(rollout.text, reward, rollout.finish_reason, len(rollout.token_ids))
        for rollout, reward in zip(scored.group.rollouts, scored.rewards, strict=True)
    )
    return Record(prompt.index, prompt.text, prompt.answers, len(prompt.token_ids), responses)
