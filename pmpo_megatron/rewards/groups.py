"""Groups of responses with their rewards: what advantages, metrics and benchmarks are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pmpo_megatron.rewards.scorer import RewardScorer
from pmpo_megatron.types import RolloutGroup


@dataclass(frozen=True)
class ScoredGroup:
    """A group of responses with the reward of each, and whether each is correct: by its first function alone."""

    group: RolloutGroup
    rewards: tuple[float, ...]
    correct: tuple[bool, ...]

    @property
    def informative(self) -> bool:
        """Whether the rewards differ: a group of equal rewards has advantage 0 and teaches nothing."""
        return len(set(self.rewards)) > 1


def score_groups(groups: Sequence[RolloutGroup], scorer: RewardScorer) -> list[ScoredGroup]:
    """Every response of ``groups`` scored, in one call so that the workers share the work evenly."""
    return [ScoredGroup(group, *scores) for group, scores in zip(groups, scorer.score(groups), strict=True)]
