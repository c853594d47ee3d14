"""The reward of a rollout: weighted functions of its text, less penalties on its form, or what its episode says."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pmpo_megatron.rewards.config import RewardConfig
from pmpo_megatron.rewards.pool import Request, RewardPool

if TYPE_CHECKING:
    from pmpo_megatron.types import RolloutGroup

logger = logging.getLogger(__name__)
CORRECT = 0.5  # a response to which the first of its functions gives this or more is correct
Scores = tuple[tuple[float, ...], tuple[bool, ...]]  # of a group: rewards, and which responses are correct


class RewardScorer:
    """Scores rollouts as `RewardConfig` says, in a `RewardPool`.

    Args:
        max_tokens: the limit on response tokens, where the overlong penalty is largest.
        functions: all that may score a prompt, where prompts name functions of their own; else those of ``config``.
    """

    def __init__(self, config: RewardConfig, *, max_tokens: int, functions: Sequence[str] | None = None) -> None:
        self.config, self.max_tokens = config, max_tokens
        self.pool = RewardPool(
            functions or list(config.functions),
            workers=config.workers,
            timeout=config.timeout_s,
            memory_gib=config.memory_gib,
            evaluated=config.evaluated,
            code=config.code,
            concurrency=config.concurrency,
            attempts=config.attempts,
        )

    def score(self, groups: Sequence[RolloutGroup]) -> list[Scores]:
        """Rewards of each group's rollouts, and which of them are correct by the first function alone; in order."""
        asked = [group for group in groups if _asks(group)]
        requests = [
            Request([r.text for r in g.rollouts], g.prompt.answers, g.prompt.metadata, list(self._weights(g))) for g in asked
        ]
        scores = iter(self.pool.score_requests(requests))
        return [self._rewarded(group, next(scores) if _asks(group) else {}) for group in groups]

    def _weights(self, group: RolloutGroup) -> Mapping[str, float]:
        return group.prompt.rewards or self.config.functions

    def _rewarded(self, group: RolloutGroup, scores: Mapping[str, Sequence[float]]) -> Scores:
        """By ``scores`` of the functions, but for episodes that came with a reward, or know whether they are correct."""
        weights, rewards, correct = self._weights(group), [], []
        for place, rollout in enumerate(group.rollouts):
            episode = rollout.episode
            if episode is not None and episode.reward is not None:
                reward = first = episode.reward
            else:
                reward = sum(weight * scores[name][place] for name, weight in weights.items())
                reward -= self.overlong_penalty(rollout.num_sampled)
                first = scores[next(iter(weights))][place]
            rewards.append(reward)
            correct.append(first >= CORRECT if episode is None or episode.correct is None else episode.correct)
        return tuple(rewards), tuple(correct)

    def overlong_penalty(self, length: int) -> float:
        """DAPO's soft penalty (2503.14476, eq. 13): 0 up to max_tokens - overlong_tokens, then linear to the largest."""
        if not self.config.overlong_penalty:
            return 0.0
        over = length - (self.max_tokens - self.config.overlong_tokens)
        return self.config.overlong_penalty * min(max(over / self.config.overlong_tokens, 0.0), 1.0)

    def close(self) -> None:
        """Ends the workers, and says what each function has cost."""
        self.pool.close()
        for name, stats in self.pool.stats.functions.items():
            if stats.calls:
                logger.info("reward %s: %s", name, stats.describe())


def _asks(group: RolloutGroup) -> bool:
    """Whether functions are needed: one of the rollouts did not come with its reward."""
    return any(rollout.episode is None or rollout.episode.reward is None for rollout in group.rollouts)
