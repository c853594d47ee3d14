"""A few trajectories of a round token by token: log-ratios, and what share of the gradient each token has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pmpo_megatron.algo.objective import ObjectiveConfig, evaluate_objective
from pmpo_megatron.model.inputs import local_indices
from pmpo_megatron.model.step import TokenScores
from pmpo_megatron.model.step_results import StepResult
from pmpo_megatron.parallel.collectives import gather_objects
from pmpo_megatron.parallel.state import ParallelState
from pmpo_megatron.types import MicroBatch, Sample

RECORDED_ROUNDS = 40  # of a run, evenly spread
MAX_TOKENS = 4096  # of a trajectory that a person would look at


def recorded(round_index: int, rounds: int) -> bool:
    """Whether this round of ``rounds`` is among those whose examples are recorded."""
    return round_index % max(1, rounds // RECORDED_ROUNDS) == 0 or round_index == rounds - 1


def token_examples(
    micro_batches: Sequence[MicroBatch],
    old: Sequence[TokenScores | None],
    new: Sequence[TokenScores | None],
    result: StepResult,
    samples: Sequence[Sample],
    *,
    objective: ObjectiveConfig,
    progress: float,
    count: int,
    decode: Callable[[int], str] | None,
    state: ParallelState,
) -> list[dict[str, Any]]:
    """``count`` trajectories of one optimizer step as `describe_tokens` has them, on rank 0. Collective.

    Args:
        micro_batches, old, samples: of the step.
        new: the log-probs that the step saw: `score` just before it.
        decode: a token as text; None on all ranks but rank 0.
    """
    by_id = {sample.sample_id: sample for sample in samples}
    chosen = choose(result, by_id, count)
    local = local_log_probs(micro_batches, old, new, chosen, state) if state.tp_rank == 0 else {}
    parts = gather_objects(local, state)
    if decode is None:
        return []
    examples = []
    for sample_id in chosen:
        pieces = [part[sample_id] for part in parts if sample_id in part]
        position, before, now = (np.concatenate(column) for column in zip(*pieces, strict=True))
        order = np.argsort(position)
        examples.append(
            describe_tokens(by_id[sample_id], before[order], now[order], objective, progress=progress, decode=decode)
        )
    return examples


def choose(result: StepResult, by_id: dict[int, Sample], count: int) -> list[int]:
    """Sample ids of ``count`` trajectories that have a gradient, from the least p to the largest; the same on every rank."""
    arrays = result.trajectories
    order = np.lexsort((arrays["sample_id"], arrays["ess"] / np.maximum(arrays["length"], 1), arrays["p"]))
    ids = [int(arrays["sample_id"][i]) for i in order if 0 < arrays["length"][i] <= MAX_TOKENS]
    ids = [sample_id for sample_id in ids if by_id[sample_id].advantage != 0]
    at = np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)) if ids else []
    return [ids[index] for index in at]


def local_log_probs(
    micro_batches: Sequence[MicroBatch],
    old: Sequence[TokenScores | None],
    new: Sequence[TokenScores | None],
    chosen: Sequence[int],
    state: ParallelState,
) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(positions, old, new log-probs) of this rank's response tokens of each chosen trajectory; on the last stage."""
    found = {}
    for micro_batch, before, now in zip(micro_batches, old, new, strict=True):
        if before is None or now is None:
            continue
        here = local_indices(micro_batch, state)
        trajectory_T = micro_batch.trajectory_T[here]
        for index, sample_id in enumerate(micro_batch.sample_ids):
            if sample_id in chosen:
                at = (trajectory_T == index).nonzero().flatten()
                values = (before.log_probs_T.cpu()[at].numpy(), now.log_probs_T.cpu()[at].numpy())
                found[sample_id] = (here[at].numpy(), *values)
    return found


def describe_tokens(
    sample: Sample,
    old_T: np.ndarray,
    new_T: np.ndarray,
    objective: ObjectiveConfig,
    *,
    progress: float,
    decode: Callable[[int], str],
) -> dict[str, Any]:
    """One trajectory for `monitor.token_page`: text, ``log_ratio`` and ``weight`` w[t] * T of every response token.

    The weights come out of the objective's own gradient, d loss / d log_ratio = -A M w[t], so they are right for every rule
    and clip; a token that is clipped has weight 0.
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
    )
    output.surrogate.backward()
    weight_T = -log_probs_T.grad.numpy() / (sample.advantage * float(output.power_mean_N)) * length
    one = {name: float(getattr(output, f"{name}_N")) for name in ("p", "ess", "target_ess", "clip_fraction")}
    return one | {
        "sample_id": sample.sample_id,
        "advantage": sample.advantage,
        "reward": sample.reward,
        "prompt": "".join(map(decode, sample.prompt_ids)),
        "tokens": [decode(token) for token in sample.response_ids],
        "log_ratio": (new_T - old_T).round(4).tolist(),
        "weight": weight_T.round(4).tolist(),
    }
