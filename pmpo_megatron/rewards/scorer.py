"""The reward of a rollout: weighted functions of its text, less penalties on its form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmpo_megatron.rewards.config import RewardConfig
from pmpo_megatron.rewards.pool import RewardPool

if TYPE_CHECKING:
    from pmpo_megatron.types import Prompt, Rollout


class RewardScorer:
    """Scores rollouts as `RewardConfig` says, in a `RewardPool`.

    Args:
        max_tokens: the limit on response tokens, where the overlong penalty is largest.
    """

    def __init__(self, config: RewardConfig, *, max_tokens: int) -> None:
        self.config, self.max_tokens = config, max_tokens
        limits = dict(timeout=config.timeout_s, memory_gib=config.memory_gib)
        self.pool = RewardPool(
            list(config.functions), workers=config.workers, evaluated=config.evaluated, code=config.code, **limits
        )

    def score_rollouts(self, rollouts: Sequence[tuple[Prompt, Rollout]]) -> list[float]:
        """The reward of each rollout, in order."""
        prompts = [prompt for prompt, _ in rollouts]
        scores = self.pool.score_all(
            [rollout.text for _, rollout in rollouts], [p.answers for p in prompts], [p.metadata for p in prompts]
        )
        weights = list(self.config.functions.values())
        return [
            sum(w * s for w, s in zip(weights, each, strict=True)) - self.overlong_penalty(len(rollout.token_ids))
            for each, (_, rollout) in zip(scores, rollouts, strict=True)
        ]

    def overlong_penalty(self, length: int) -> float:
        """DAPO's soft penalty (2503.14476, eq. 13): 0 up to max_tokens - overlong_tokens, then linear to the largest."""
        if not self.config.overlong_penalty:
            return 0.0
        over = length - (self.max_tokens - self.config.overlong_tokens)
        return self.config.overlong_penalty * min(max(over / self.config.overlong_tokens, 0.0), 1.0)

    def close(self) -> None:
        self.pool.close()
