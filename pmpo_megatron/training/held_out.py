"""Held-out problems, answered by the rollout engine and scored: the periodic evaluation inside a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pmpo_megatron.data.prompts import PromptSet
from pmpo_megatron.monitor import Distribution, Mean, Metric
from pmpo_megatron.rewards import RewardScorer, ScoredGroup, score_groups
from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.rollout.engine import RolloutEngine
from pmpo_megatron.training.run_config import EvaluationConfig
from pmpo_megatron.training.sources import accuracy, groups_by_source

GREEDY_APART = 10**9  # rounds between the sampled and the greedy responses of an evaluation: rollouts are recorded by round


class Evaluator:
    """Scores the engine's present weights on the same held-out problems every time."""

    def __init__(
        self,
        config: EvaluationConfig,
        *,
        prompts: PromptSet,
        engine: RolloutEngine,
        scorer: RewardScorer,
        sampling: SamplingConfig,
    ) -> None:
        by_source = [[prompt for prompt in prompts.prompts if prompt.source == name] for name in prompts.weights]
        self.prompts = [prompt for source in by_source for prompt in source[: config.max_problems]]
        self.engine, self.scorer = engine, scorer
        self.sampling = replace(sampling, samples_per_prompt=config.samples, temperature=config.temperature, top_p=1.0, top_k=0)
        self.greedy = replace(self.sampling, samples_per_prompt=1, temperature=0.0) if config.greedy else None

    def evaluate(self, round_index: int) -> dict[str, Metric]:
        """Accuracy, reward and length before round ``round_index``, and the accuracy of each source.

        A response is correct if the first of its reward functions gives it at least `scorer.CORRECT`, whatever the others and
        penalties make of the reward; the accuracy is the share of correct ones.

        The engine sees a negative round number: seeds and recorded rollouts of evaluations are apart from training's.
        """
        groups = self._answer(self.sampling, -1 - round_index)
        lengths = np.array([rollout.num_sampled for group in groups for rollout in group.group.rollouts])
        metrics: dict[str, Metric] = {
            "eval/accuracy_mean": accuracy(groups),
            "eval/reward": Mean.of(np.array([np.mean(group.rewards) for group in groups])),
            "eval/length": Distribution(lengths),
        }
        metrics |= {f"eval/{name}/accuracy_mean": accuracy(members) for name, members in groups_by_source(groups).items()}
        if self.greedy is not None:
            groups = self._answer(self.greedy, -1 - round_index - GREEDY_APART)
            metrics["eval/greedy_accuracy_mean"] = accuracy(groups)
            metrics |= {f"eval/{name}/greedy_accuracy_mean": accuracy(of) for name, of in groups_by_source(groups).items()}
        return metrics

    def _answer(self, sampling: SamplingConfig, round_index: int) -> list[ScoredGroup]:
        return score_groups(self.engine.generate(self.prompts, sampling, round_index=round_index), self.scorer)
