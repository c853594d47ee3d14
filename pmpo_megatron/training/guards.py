"""When a run warns and when it stops: non-finite optimizer steps, and trainer and engine drifting apart."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pmpo_megatron.errors import MismatchError, NonFiniteError
from pmpo_megatron.model.micro_batch import ScoredMicroBatch
from pmpo_megatron.model.step_results import StepResult
from pmpo_megatron.monitor import Metric, summarize
from pmpo_megatron.parallel.state import ParallelState
from pmpo_megatron.training.run_config import GuardConfig

logger = logging.getLogger(__name__)


def check_step(result: StepResult, skipped_in_a_row: int, config: GuardConfig, name: str, state: ParallelState) -> None:
    """Warns, on rank 0, about a skipped step.

    Raises:
        NonFiniteError: it is one too many in a row.
    """
    if state.is_main:
        logger.warning("%s: skipped, weights unchanged: %s", name, result.problem)
    if skipped_in_a_row >= config.max_skipped_steps:
        raise NonFiniteError(f"{skipped_in_a_row} optimizer steps in a row were not finite; the last, {name}: {result.problem}")


def dump_step(
    directory: Path,
    name: str,
    micro_batches: Sequence[ScoredMicroBatch],
    result: StepResult,
    state: ParallelState,
) -> None:
    """Writes what a skipped step was given, one file for each rank, so that it can be run again.

    Fields are plain tensors and numbers: ``torch.load(..., weights_only=True)`` reads them. A full disk only warns.
    """
    path = directory / f"{name}-rank-{state.rank:05d}.pt"
    plain = {
        "problem": result.problem,
        "micro_batches": [_plain(micro_batch) for micro_batch in micro_batches],
        "trajectories": {key: torch.from_numpy(values) for key, values in result.trajectories.items()},
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(plain, path)
    except OSError as error:
        logger.warning("%s: not written: %s", path, error)


def _plain(scored: ScoredMicroBatch) -> dict[str, Any]:
    """The fields of both records in one; of Megatron's description of the sequences their boundaries, of routing the routes."""
    both = [(item.name, getattr(record, item.name)) for record in (scored.batch, scored) for item in dataclasses.fields(record)]
    fields = {name: value for name, value in both if name not in ("batch", "sequences", "routing")}
    fields["boundaries"] = scored.batch.sequences.boundaries
    fields |= {f"routes of layer {layer}": routes for layer, routes in scored.routing.told.items()}
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}


def check_mismatch(
    metrics: dict[str, Metric], config: GuardConfig, round_index: int, state: ParallelState
) -> dict[str, Metric]:
    """``metrics`` as they came; warns, on rank 0, where the engine's log-probs differ much from the trainer's.

    Raises:
        MismatchError: they differ by more than ``mismatch_stop``.
    """
    mean = summarize(metrics).get("mismatch/mean_abs", 0.0)
    text = f"round {round_index}: log-probs of trainer and rollout engine differ by {mean:.3g} nats on average"
    if config.mismatch_stop is not None and not mean <= config.mismatch_stop:
        raise MismatchError(f"{text}, above guards.mismatch_stop = {config.mismatch_stop:g}; weights, dtype or template differ")
    if state.is_main and not mean <= config.mismatch_warn:
        logger.warning("%s, above guards.mismatch_warn = %g", text, config.mismatch_warn)
    return metrics
