"""A micro-batch as one rank feeds it to its model chunks: this context-parallel rank's tokens, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pmpo_megatron.model.layers import PackedSequences, packed_sequences
from pmpo_megatron.parallel.shards import check_boundaries, context_indices, sequence_multiple
from pmpo_megatron.parallel.state import ParallelState
from pmpo_megatron.types import MicroBatch


@dataclass
class Inputs:
    """Legend: L tokens on this context-parallel rank (named T in what goes on to the objective), N trajectories."""

    tokens_1T: torch.Tensor  # int64 [1, L]
    position_ids_1T: torch.Tensor  # int64 [1, L]
    targets_T: torch.Tensor  # int64 [L]
    trajectory_T: torch.Tensor  # int64 [L]
    wanted: torch.Tensor  # int64: positions in [0, L) of the response tokens
    rollout_log_probs_T: torch.Tensor  # float32 [L]
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    sample_ids: tuple[int, ...]
    packed: PackedSequences
    num_response_tokens: int  # over all context-parallel ranks
    old_log_probs_T: torch.Tensor | None = None
    reference_log_probs_T: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.targets_T.numel()

    @property
    def num_trajectories(self) -> int:
        return len(self.sample_ids)


def local_indices(micro_batch: MicroBatch, state: ParallelState) -> torch.Tensor:
    """int64 [L]: which of the micro-batch's tokens this context-parallel rank holds, in its order."""
    return context_indices(micro_batch.cu_seqlens.tolist(), size=state.cp_size, rank=state.cp_rank)


def prepare_inputs(micro_batch: MicroBatch, state: ParallelState) -> Inputs:
    """Takes this rank's tokens and moves them; all index arithmetic happens on the host before the move.

    Raises:
        ConfigError: a sequence's length does not fit the layout; see `shards.sequence_multiple`.
    """
    boundaries = tuple(micro_batch.cu_seqlens.tolist())
    check_boundaries(boundaries, sequence_multiple(state.config))
    here = context_indices(boundaries, size=state.cp_size, rank=state.cp_rank)
    trajectory_T = micro_batch.trajectory_T[here]

    def moved(values: torch.Tensor) -> torch.Tensor:
        return values.to(state.device, non_blocking=True)

    return Inputs(
        tokens_1T=moved(micro_batch.tokens_T[here]).unsqueeze(0),
        position_ids_1T=moved(micro_batch.position_ids_T[here]).unsqueeze(0),
        targets_T=moved(micro_batch.targets_T[here]),
        trajectory_T=moved(trajectory_T),
        wanted=moved((trajectory_T >= 0).nonzero().flatten()),
        rollout_log_probs_T=moved(micro_batch.rollout_log_probs_T[here]),
        advantages_N=moved(micro_batch.advantages_N),
        weights_N=moved(micro_batch.weights_N),
        sample_ids=micro_batch.sample_ids,
        packed=packed_sequences(boundaries, context_size=state.cp_size, device=state.device),
        num_response_tokens=int((micro_batch.trajectory_T >= 0).sum()),
    )
