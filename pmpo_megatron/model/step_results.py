"""What an optimizer step did: micro-batches' results added up over ranks, and what is reported of them.

Legend: N trajectories of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pmpo_megatron.algo.objective import ObjectiveOutput
from pmpo_megatron.model.micro_batch import MicroBatch
from pmpo_megatron.parallel.collectives import gather_objects, sum_over
from pmpo_megatron.parallel.state import ParallelState

TRAJECTORY_FIELDS = ("p", "ess", "target_ess", "clip_fraction", "length", "power_mean")


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did; equal on every rank.

    Attributes:
        loss: the objective's loss with its KL and entropy terms, over all trajectories of the step.
        grad_norm: of the whole gradient before clipping; NaN where it was not computed.
        learning_rate: of this update.
        applied: whether weights changed.
        problem: why not, naming trajectories or parameters with NaN or inf; None if all is well.
        trajectories: one array per quantity (sample_id, p, ess, target_ess, clip_fraction, length, power_mean), in the
            same order, of all data-parallel ranks.
        entropy: mean over response tokens, nats.
        kl: mean estimated KL to the reference per response token; None without a reference.
        num_tokens: response tokens of the step.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool
    problem: str | None
    trajectories: dict[str, np.ndarray]
    entropy: float
    kl: float | None
    num_tokens: int


@dataclass(frozen=True)
class MicroResult:
    """What one micro-batch gave: tensors on the device, which nobody has waited for."""

    surrogate: torch.Tensor
    output: ObjectiveOutput
    entropy: torch.Tensor  # this shard's share of the step's mean
    kl: torch.Tensor | None  # likewise
    penalty: torch.Tensor  # this shard's share of the loss beside the objective

    def detached(self) -> MicroResult:
        kl = None if self.kl is None else self.kl.detach()
        return MicroResult(self.surrogate.detach(), self.output, self.entropy.detach(), kl, self.penalty.detach())


def collect_results(
    results: list[MicroResult], batches: list[MicroBatch], state: ParallelState
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Sums and per-trajectory arrays over the step, on every rank. One all-reduce (data x context) and one gather."""
    mine: tuple[dict[str, Any], dict[str, np.ndarray]] | None = None
    if state.is_last_stage:
        sums = sum_over(state.dp_cp_group)(_sums(results, state))
        if state.tp_rank == 0 and state.cp_rank == 0:
            mine = _to_host(sums, results, batches)
    given = [item for item in gather_objects(mine, state) if item is not None]
    bad = sorted(sample for totals, _ in given for sample in totals["non_finite"])
    arrays = {name: np.concatenate([values[name] for _, values in given]) for name in ("sample_id", *TRAJECTORY_FIELDS)}
    return given[0][0] | {"non_finite": bad}, arrays


def _sums(results: list[MicroResult], state: ParallelState) -> torch.Tensor:
    """float64 [3]: loss, entropy, KL. The objective's loss is equal on all shards of a trajectory: counted once."""
    zero = torch.zeros((), dtype=torch.float64, device=state.device)
    loss = sum((r.output.loss.double() / state.cp_size + r.penalty.double() for r in results), zero)
    entropy = sum((r.entropy.double() for r in results), zero)
    kl = sum((r.kl.double() for r in results if r.kl is not None), zero)
    return torch.stack([loss, entropy, kl])


def _to_host(
    sums: torch.Tensor, results: list[MicroResult], batches: list[MicroBatch]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The one synchronisation of a step before the update."""
    columns = [torch.cat([getattr(r.output, f"{name}_N").double() for r in results]) for name in TRAJECTORY_FIELDS]
    columns.append(torch.cat([r.output.non_finite_N for r in results]).double())
    table = torch.stack(columns).cpu().numpy()
    loss, entropy, kl = sums.tolist()
    sample_ids = np.array([sample for batch in batches for sample in batch.sample_ids], dtype=np.int64)
    arrays = dict(zip(TRAJECTORY_FIELDS, table, strict=False)) | {"sample_id": sample_ids}
    totals = {
        "loss": loss,
        "entropy": entropy,
        "kl": kl if any(r.kl is not None for r in results) else None,
        "non_finite": sample_ids[table[-1] > 0].tolist(),
    }
    return totals, arrays
