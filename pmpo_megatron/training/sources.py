"""What a round and an evaluation are reported by, source by source, where prompts come from several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pmpo_megatron.model.step_results import StepResult
from pmpo_megatron.monitor import Distribution, Mean, Metric
from pmpo_megatron.rewards import ScoredGroup
from pmpo_megatron.training.round_metrics import per_token, trajectory_arrays


def groups_by_source(groups: Sequence[ScoredGroup]) -> dict[str, list[ScoredGroup]]:
    """The groups of each source; empty where there is one alone, which has no name."""
    found: dict[str, list[ScoredGroup]] = {}
    for group in groups:
        if group.group.prompt.source:
            found.setdefault(group.group.prompt.source, []).append(group)
    return found


def accuracy(groups: Sequence[ScoredGroup]) -> Mean:
    """Share of correct responses, mean over problems."""
    return Mean.of(np.array([np.mean(group.correct) for group in groups]))


def reward_metrics(groups: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Reward, accuracy and length of each source's responses, under ``source/<name>/``."""
    metrics: dict[str, Metric] = {}
    for name, members in groups_by_source(groups).items():
        lengths = [rollout.num_sampled for group in members for rollout in group.group.rollouts]
        metrics |= {
            f"source/{name}/reward": Distribution(np.array([reward for group in members for reward in group.rewards])),
            f"source/{name}/accuracy": accuracy(members),
            f"source/{name}/informative_groups": Mean.of([group.informative for group in members]),
            f"source/{name}/length": Distribution(np.array(lengths)),
        }
    return metrics


def objective_metrics(results: Sequence[StepResult], sources: Sequence[str]) -> dict[str, Metric]:
    """p, ESS and clip fraction of each source's trajectories; ``sources`` are names by the number of the sample."""
    arrays = trajectory_arrays(results)
    metrics: dict[str, Metric] = {}
    of_sample = np.array(sources)[arrays["sample_id"]]
    for name in filter(None, dict.fromkeys(sources)):
        chosen = of_sample == name
        metrics |= {
            f"source/{name}/p": Distribution(arrays["p"][chosen]),
            f"source/{name}/ess_fraction": Mean.of(per_token(arrays, "ess")[chosen]),
            f"source/{name}/clip_fraction": Mean.of(arrays["clip_fraction"][chosen]),
        }
    return metrics
