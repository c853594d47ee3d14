"""Rank 0's half of a round: prompts are sampled, answered by the rollout engine, scored, and become samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmpo_megatron.algo.advantages import Advantage, compute_advantages
from pmpo_megatron.data.prompts import PromptSet
from pmpo_megatron.data.sampler import Sampler
from pmpo_megatron.monitor import Distribution, Mean, Metric, Sum
from pmpo_megatron.rewards import RewardScorer, ScoredGroup, score_groups
from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.rollout.engine import RolloutEngine
from pmpo_megatron.training.run_config import BatchConfig, RoundConfig
from pmpo_megatron.training.sources import reward_metrics
from pmpo_megatron.types import Rollout, Sample, TrajectoryTable

POLL_S = 0.05


@dataclass(frozen=True)
class RoundBatch:
    """A round's trajectories and what was seen while they were collected; on rank 0 alone, the others get their samples."""

    samples: tuple[Sample, ...]  # group after group
    table: TrajectoryTable  # of the samples
    versions: np.ndarray  # int32, one for each sample: the oldest that made one of its tokens
    metrics: dict[str, float | Metric]
    sampler_state: dict[str, Any]  # after this round's prompts: what a checkpoint of the finished round holds
    examples: tuple[dict[str, Any], ...]  # a few rollouts for people
    sources: tuple[str, ...]  # of each sample
    drawn: int = 0  # as in progress.RunProgress
    open: tuple[tuple[int, ...], ...] = ()


class Collector:
    """Collects rounds of scored trajectories in a thread of its own, at most one round at a time.

    Args:
        examples: how many responses of a round are kept as text for people.
    """

    def __init__(
        self,
        *,
        prompts: PromptSet,
        sampler: Sampler,
        engine: RolloutEngine,
        scorer: RewardScorer,
        sampling: SamplingConfig,
        batch: BatchConfig,
        round: RoundConfig,
        advantage: Advantage,
        examples: int,
    ) -> None:
        self.prompts, self.sampler, self.engine, self.scorer = prompts, sampler, engine, scorer
        self.sampling, self.batch, self.round = sampling, batch, round
        self.advantage, self.examples = advantage, examples
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._pending: tuple[int, Future[RoundBatch]] | None = None

    def start(self, round_index: int) -> tuple[int, Future[RoundBatch]]:
        """Begins to collect ``round_index``; `collect` waits for it. Weights must not be pushed meanwhile."""
        self._pending = round_index, self._thread.submit(self._collect, round_index)
        return self._pending

    def collect(self, round_index: int, *, stop: Callable[[], bool]) -> RoundBatch | None:
        """The batch of ``round_index``, begun here if it was not before; None if ``stop()`` turned true meanwhile.

        Raises:
            RolloutError: the engine failed beyond repair.
        """
        pending, future = self._pending or self.start(round_index)
        if pending != round_index:
            _, future = self.start(round_index)
        while not future.done():
            if stop():
                return None
            time.sleep(POLL_S)
        self._pending = None
        return future.result()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.scorer.close()

    def _collect(self, round_index: int) -> RoundBatch:
        started = time.monotonic()
        groups = self._generate(self.batch.prompts_per_round, round_index)
        generated = len(groups)
        if self.round.dynamic_sampling:
            groups, generated = self._replace_uninformative(groups, round_index)
        return self._batch(groups, {"rollout/groups_generated": float(generated)}, started)

    def _batch(self, groups: Sequence[ScoredGroup], counted: dict[str, float], started: float, **draws: Any) -> RoundBatch:
        """The round of ``groups``, with what was ``counted`` since it was ``started``."""
        counted = counted | self.scorer.pool.stats.metrics() | {"time/collecting_s": time.monotonic() - started}
        samples = make_samples(groups, advantage=self.advantage)
        rollouts = [rollout for group in groups for rollout in group.group.rollouts]
        return RoundBatch(
            samples=tuple(samples),
            table=TrajectoryTable.of(samples, [reward for group in groups for reward in group.rewards]),
            versions=np.array([rollout.policy_version for rollout in rollouts]),
            metrics=describe_groups(groups) | reward_metrics(groups) | counted,
            sampler_state=self.sampler.state(),
            examples=tuple(example_rollouts(groups, self.examples)),
            sources=tuple(group.group.prompt.source for group in groups for _ in group.rewards),
            **draws,
        )

    def _generate(self, count: int, round_index: int) -> list[ScoredGroup]:
        prompts = [self.prompts[index] for index in self.sampler.next(count)]
        return score_groups(self.engine.generate(prompts, self.sampling, round_index=round_index), self.scorer)

    def _replace_uninformative(self, groups: list[ScoredGroup], round_index: int) -> tuple[list[ScoredGroup], int]:
        """``groups`` with those of equal rewards replaced where further prompts gave better ones; and how many were made."""
        useful = [group for group in groups if group.informative]
        spare = [group for group in groups if not group.informative]
        generated = len(groups)
        for _ in range(self.round.dynamic_sampling_attempts):
            missing = len(groups) - len(useful)
            if not missing:
                break
            further = self._generate(missing, round_index)
            generated += missing
            useful += [group for group in further if group.informative]
        return (useful + spare)[: len(groups)], generated


def make_samples(groups: Sequence[ScoredGroup], *, advantage: str | Advantage) -> list[Sample]:
    """One `Sample` for every response, group after group."""
    advantages = compute_advantages([group.rewards for group in groups], advantage)
    samples: list[Sample] = []
    for group_id, (scored, values) in enumerate(zip(groups, advantages, strict=True)):
        for rollout, value in zip(scored.group.rollouts, values, strict=True):
            episode = rollout.episode
            samples.append(
                Sample(
                    sample_id=len(samples),
                    group_id=group_id,
                    prompt_ids=scored.group.prompt.token_ids if episode is None else episode.prompt_ids,
                    response_ids=rollout.token_ids,
                    rollout_log_probs=rollout.log_probs,
                    truncated=rollout.finish_reason == "length",
                    advantage=float(value),
                    routes=rollout.routes,
                    sampled=None if episode is None or episode.sampled.all() else episode.sampled,
                )
            )
    return samples


def describe_groups(groups: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Rewards, lengths, and how many groups teach anything."""
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    return {
        "reward/": Distribution(np.array([reward for group in groups for reward in group.rewards])),
        "reward/informative_groups": Mean.of([group.informative for group in groups]),
        "rollout/length": Distribution(np.array([rollout.num_sampled for rollout in rollouts])),
        "rollout/versions": Mean.of([len(np.unique(rollout.versions[rollout.sampled])) for rollout in rollouts]),
        "rollout/truncated_fraction": Mean.of([rollout.finish_reason == "length" for rollout in rollouts]),
    } | describe_episodes(rollouts)


def describe_episodes(rollouts: Sequence[Rollout]) -> dict[str, Metric]:
    """Turns, what was told, what of a next turn's beginning was in the engine's cache, failures by kind, the user's own."""
    episodes = [rollout.episode for rollout in rollouts if rollout.episode is not None]
    if not episodes:
        return {}
    metrics: dict[str, Metric] = {
        "episode/turns": Distribution(np.array([episode.turns for episode in episodes])),
        "episode/told_tokens": Distribution(np.array([int((~episode.sampled).sum()) for episode in episodes])),
        "episode/cached_fraction": Mean(sum(e.cached for e in episodes), max(sum(e.asked for e in episodes), 1)),
        "episode/failures": Sum(sum(bool(episode.failure) for episode in episodes)),
    }
    for kind in sorted({episode.failure for episode in episodes} - {""}):
        metrics[f"episode/failed/{kind}"] = Sum(sum(episode.failure == kind for episode in episodes))
    for name in sorted({name for episode in episodes for name in episode.metrics}):
        metrics[f"episode/{name}"] = Mean.of([episode.metrics[name] for episode in episodes if name in episode.metrics])
    return metrics


def example_rollouts(groups: Sequence[ScoredGroup], count: int) -> list[dict[str, Any]]:
    """``count`` responses spread over the round, as text."""
    rows = [
        (group, rollout, reward)
        for group in groups
        for rollout, reward in zip(group.group.rollouts, group.rewards, strict=True)
    ]
    chosen = rows[:: max(1, len(rows) // max(count, 1))][:count]
    return [
        {
            "prompt": group.group.prompt.text,
            "response": rollout.text,
            "reward": reward,
            "answers": list(group.group.prompt.answers),
            "tokens": rollout.num_sampled,
            "finish_reason": rollout.finish_reason,
            "policy_version": rollout.policy_version,
            **({} if (episode := rollout.episode) is None else {"turns": episode.turns}),
            **({} if episode is None or not episode.failure else {"failure": episode.failure}),
        }
        for group, rollout, reward in chosen
    ]
