"""What a finished round is reported by: metrics of its optimizer steps, and the gap between engine and trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from pmpo_megatron.algo.importance import MISMATCH, mismatch_sums
from pmpo_megatron.model.micro_batch import ScoredMicroBatch
from pmpo_megatron.model.step_results import StepResult
from pmpo_megatron.monitor import Distribution, Maximum, Mean, Metric, Sum
from pmpo_megatron.parallel.collectives import gather_objects, sum_over
from pmpo_megatron.parallel.liveness import naming_ranks
from pmpo_megatron.parallel.state import ParallelState


def step_metrics(results: Sequence[StepResult]) -> dict[str, Metric]:
    """Metrics of a round's optimizer steps, equal on every rank."""
    arrays = trajectory_arrays(results)
    applied = [result for result in results if result.applied]
    metrics: dict[str, Metric] = {
        "objective/p": Distribution(arrays["p"]),
        "objective/ess_fraction": Mean.of(per_token(arrays, "ess")),
        "objective/ess_target": Mean.of(per_token(arrays, "target_ess")),
        "objective/clip_fraction": Mean.of(arrays["clip_fraction"]),
        "objective/loss": Mean.of([result.loss for result in results]),
        "policy/entropy": Mean.of([result.entropy for result in results], [result.num_tokens for result in results]),
        "policy/skipped_steps": Sum(len(results) - len(applied)),
    }
    if applied:
        metrics["policy/grad_norm"] = Mean.of([result.grad_norm for result in applied])
        metrics["policy/grad_norm_max"] = Maximum(max(result.grad_norm for result in applied))
        metrics["policy/learning_rate"] = Mean.of([result.learning_rate for result in applied])
    measured = [(result.kl, result.num_tokens) for result in results if result.kl is not None]
    if measured:
        metrics["policy/kl_reference"] = Mean.of(*zip(*measured, strict=True))
    return metrics


def trajectory_arrays(results: Sequence[StepResult]) -> dict[str, np.ndarray]:
    """Every quantity of every trajectory of the round; sample_id says which."""
    return {name: np.concatenate([result.trajectories[name] for result in results]) for name in results[0].trajectories}


def per_token(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The quantity ``name`` of every trajectory over its length; one without tokens counts as of one."""
    return arrays[name] / np.maximum(arrays["length"], 1)


def trajectory_record(results: Sequence[StepResult], rewards: np.ndarray) -> dict[str, np.ndarray]:
    """What the report plots of each trajectory; ``rewards`` are those of the round's samples, by their number."""
    arrays = trajectory_arrays(results)
    chosen = {name: arrays[name] for name in ("p", "ess", "target_ess", "clip_fraction", "length")}
    return chosen | {"reward": rewards[arrays["sample_id"]]}


def measure_mismatch(
    steps: Sequence[Sequence[ScoredMicroBatch]], log_bounds: tuple[float, float], state: ParallelState
) -> dict[str, Metric]:
    """|trainer - engine| log-probs of the sampled tokens before any update of the round. Collective; equal on every rank."""
    found = None
    if state.is_last_stage:
        sums = torch.zeros(len(MISMATCH), dtype=torch.float64, device=state.device)
        largest = torch.zeros((), dtype=torch.float64, device=state.device)
        rejected = torch.zeros((), dtype=torch.float64, device=state.device)
        for item in (item for step in steps for item in step):
            batch = item.batch
            more, peak = mismatch_sums(item.old_log_probs_T, batch.rollout_log_probs_T, batch.trajectory_T, log_bounds)
            sums, largest = sums + more, torch.maximum(largest, peak)
            if item.kept_T is not None:
                rejected += (~item.kept_T).sum()
        sums = sum_over(state.dp_cp_group)(torch.cat([sums, rejected[None]]))
        with naming_ranks("the largest mismatch"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=state.dp_cp_group)
        found = (sums.tolist(), float(largest))
    values, largest = next(item for item in gather_objects(found, state) if item is not None)
    tokens, sum_abs, sum_k1, sum_k3, outside, rejected_tokens = values
    return {
        "mismatch/mean_abs": Mean(sum_abs, tokens),
        "mismatch/max_abs": Maximum(largest),
        "mismatch/kl_k1": Mean(sum_k1, tokens),
        "mismatch/kl_k3": Mean(sum_k3, tokens),
        "mismatch/outside_clip": Mean(outside, tokens),
        "mismatch/rejected": Mean(rejected_tokens, tokens),
    }
