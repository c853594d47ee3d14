"""Rewards: answers extracted and verified in worker processes with hard time-outs.

with RewardPool("math", workers=2, timeout=5.0) as pool:
    scores = pool.score(responses, answers)      # floats; pool.stats counts time-outs and crashes
"""

from pmpo_megatron.rewards.config import RewardConfig
from pmpo_megatron.rewards.groups import ScoredGroup, score_groups
from pmpo_megatron.rewards.pool import RewardPool
from pmpo_megatron.rewards.scorer import RewardScorer

__all__ = ["RewardConfig", "RewardPool", "RewardScorer", "ScoredGroup", "score_groups"]
