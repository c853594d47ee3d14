"""A few trajectories of a round token by token: log-ratios, and what share of the gradient each token has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pmpo_megatron.algo.objective import ObjectiveConfig, evaluate_objective
from pmpo_megatron.data.split import statistics_of_groups
from pmpo_megatron.model.micro_batch import ScoredMicroBatch
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.model.step import score
from pmpo_megatron.model.step_results import StepResult
from pmpo_megatron.parallel.collectives import gather_objects
from pmpo_megatron.training.collector import RoundBatch
from pmpo_megatron.training.round_metrics import per_token
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.types import Float32s, Float64s, Integers, Sample, TrajectoryTable

RECORDED_ROUNDS = 40  # of a run, evenly spread
MAX_TOKENS = 4096  # of a trajectory that a person would look at

LogProbs = tuple[Integers, Float32s, Float32s]  # positions in the sequence, old and new log-probs; one for each token


def recorded(round_index: int, rounds: int) -> bool:
    """Whether this round of ``rounds`` is among those whose examples are recorded."""
    return round_index % max(1, rounds // RECORDED_ROUNDS) == 0 or round_index == rounds - 1


def token_examples(
    policy: Policy,
    micro_batches: Sequence[ScoredMicroBatch],
    result: StepResult,
    batch: RoundBatch | None,
    table: TrajectoryTable,
    config: RunConfig,
    *,
    round_index: int,
    decode: Callable[[int], str] | None,
) -> list[dict[str, Any]]:
    """Trajectories of a round's last optimizer step as `describe_tokens` has them, on rank 0; none elsewhere. Collective.

    They are weighed for the policy as the round leaves it: one forward pass after the last update. What corrects for the
    engine's log-probs, importance weights and rejection, is left out.

    Args:
        micro_batches, result: of that step.
        table: of all trajectories of the round.
        batch: the round's, on rank 0, as is ``decode``: a token as text.
    """
    wanted = config.monitor.token_examples and recorded(round_index, config.run.rounds)
    if not wanted or not result.applied:
        return []
    chosen = choose(result, table.advantages_N, config.monitor.token_examples)
    parts = gather_objects(local_log_probs(policy, micro_batches, chosen, config.sampling.temperature), policy.state)
    if batch is None or decode is None:
        return []
    examples, statistics = [], statistics_of_groups(table)
    for sample_id in chosen:
        columns = zip(*[part[sample_id] for part in parts if sample_id in part], strict=True)
        position, old, new = (np.concatenate(column) for column in columns)
        order = np.argsort(position)
        sample, progress = batch.samples[sample_id], round_index / config.run.rounds
        group = {name: float(values_N[sample_id]) for name, values_N in statistics.items()}
        shares = describe_tokens(sample, old[order], new[order], config.objective, progress=progress, group=group)
        shares |= {name: _spread(shares[name], sample) for name in ("log_ratio", "weight")}
        text = {"prompt": "".join(map(decode, sample.prompt_ids)), "tokens": [decode(token) for token in sample.response_ids]}
        examples.append(shares | text | {"reward": float(table.rewards_N[sample_id])})
    return examples


def _spread(values: Sequence[float], sample: Sample) -> list[float]:
    """One value for each response token, 0 where it was told, of ``values`` for those that were sampled."""
    spread = np.zeros(len(sample.response_ids))
    spread[slice(None) if sample.sampled is None else sample.sampled] = values
    return spread.tolist()


def choose(result: StepResult, advantages_N: Float64s, count: int) -> list[int]:
    """Numbers of ``count`` trajectories that have a gradient, from the least p to the largest; the same on every rank."""
    arrays = result.trajectories
    order = np.lexsort((arrays["sample_id"], per_token(arrays, "ess"), arrays["p"]))
    wanted = (arrays["length"] > 0) & (arrays["length"] <= MAX_TOKENS) & (advantages_N[arrays["sample_id"]] != 0)
    ids = arrays["sample_id"][order[wanted[order]]].astype(int).tolist()
    at = np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int))
    return [ids[index] for index in at.tolist()]


def local_log_probs(
    policy: Policy, micro_batches: Sequence[ScoredMicroBatch], chosen: Sequence[int], temperature: float
) -> dict[int, LogProbs]:
    """This rank's response tokens of each chosen trajectory; nothing on ranks that only repeat another's. Collective."""
    now = score(policy, [item.batch for item in micro_batches], temperature=temperature)
    if not policy.state.is_last_stage or policy.state.tp_rank != 0:
        return {}
    log_probs: dict[int, LogProbs] = {}
    for before, after in zip(micro_batches, now, strict=True):
        batch = before.batch
        columns = (batch.position_ids_1T[0], before.old_log_probs_T, after.old_log_probs_T)
        for index, sample_id in enumerate(batch.sample_ids):
            if sample_id in chosen:
                position, old, new = (column[batch.trajectory_T == index].cpu().numpy() for column in columns)
                log_probs[sample_id] = (position, old, new)
    return log_probs


def describe_tokens(
    sample: Sample,
    old_T: Float32s,
    new_T: Float32s,
    objective: ObjectiveConfig,
    *,
    progress: float,
    group: Mapping[str, float],
) -> dict[str, Any]:
    """The numbers of one trajectory for `monitor.token_page`: ``log_ratio`` and ``weight`` w[t] * T of every response token.

    ``group`` is what the rule may know of the trajectory's group. The weights come out of the objective's own gradient,
    d loss / d log_ratio = -A M w[t], so they are right for every rule and clip; a token without gradient has weight 0.
    """
    log_probs_T = torch.from_numpy(new_T.astype(np.float64)).requires_grad_()
    length = len(new_T)
    output = evaluate_objective(
        log_probs_T,
        torch.from_numpy(old_T.astype(np.float64)),
        torch.zeros(length, dtype=torch.int64),
        torch.tensor([sample.advantage], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        objective,
        None,
        progress,
        group_statistics={name: torch.tensor([value], dtype=torch.float64) for name, value in group.items()},
    )
    (gradient_T,) = torch.autograd.grad(output.surrogate, log_probs_T)
    weight_T: Float64s = -gradient_T.numpy() / (sample.advantage * float(output.power_mean_N)) * length
    one = {name: float(getattr(output, f"{name}_N")) for name in ("p", "ess", "target_ess", "clip_fraction")}
    return one | {
        "sample_id": sample.sample_id,
        "advantage": sample.advantage,
        "log_ratio": (new_T - old_T).round(4).tolist(),
        "weight": weight_T.round(4).tolist(),
    }
