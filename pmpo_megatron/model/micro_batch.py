"""A micro-batch on its way through a round: prepared for this rank once, then with what the round's start says of it.

Legend: T tokens on this context-parallel rank, N trajectories.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pmpo_megatron.model.layers import PackedSequences, packed_sequences
from pmpo_megatron.model.routing import Routing, make_routing
from pmpo_megatron.parallel.shards import check_boundaries, context_indices, sequence_multiple
from pmpo_megatron.parallel.state import ParallelState
from pmpo_megatron.types import PackedTrajectories


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What this rank feeds to its model chunks and to the objective: its tokens, on the device."""

    tokens_1T: torch.Tensor  # int64 [1, T]
    position_ids_1T: torch.Tensor  # int64 [1, T]
    targets_T: torch.Tensor  # int64 [T]
    trajectory_T: torch.Tensor  # int64 [T], as in PackedTrajectories
    wanted: torch.Tensor  # int64: positions in [0, T) of the response tokens
    rollout_log_probs_T: torch.Tensor  # float32 [T]
    advantages_N: torch.Tensor  # float32 [N]
    weights_N: torch.Tensor  # float32 [N], c_i of the whole optimizer step
    group_statistics: Mapping[str, torch.Tensor]  # float64 [N] each, by name
    sample_ids: tuple[int, ...]  # N of them
    sequences: PackedSequences  # with the boundaries of the sequences over all context-parallel ranks
    num_response_tokens: int  # over all context-parallel ranks
    routing: Routing  # for the routers of a mixture of experts: told the engine's routes if these are replayed

    @property
    def num_tokens(self) -> int:
        """Tokens on this context-parallel rank, T."""
        return self.targets_T.numel()

    @property
    def num_trajectories(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, eq=False)
class ScoredMicroBatch:
    """A micro-batch with its log-probs before the first update of the round: what an optimizer step takes.

    Log-probs are float32 [T], detached, 0 where there is no response token; [0] on all but the last pipeline stage.
    """

    batch: MicroBatch
    old_log_probs_T: torch.Tensor
    reference_log_probs_T: torch.Tensor | None  # None: there is no reference model
    kept_T: torch.Tensor | None  # bool [T]: tokens whose gradient counts; None: all
    routing: Routing  # told what the optimizer step replays, with the counts of the scoring


def prepare(packed: PackedTrajectories, state: ParallelState) -> MicroBatch:
    """Takes this rank's tokens and moves them; all index arithmetic happens on the host before the move.

    Raises:
        ConfigError: a sequence's length does not fit the layout; see `shards.sequence_multiple`.
    """
    check_boundaries(packed.boundaries, sequence_multiple(state.config))
    here = context_indices(packed.boundaries, size=state.cp_size, rank=state.cp_rank)
    trajectory_T = packed.trajectory_T[here]

    def moved(values: torch.Tensor) -> torch.Tensor:
        return values.to(state.device, non_blocking=True)

    return MicroBatch(
        tokens_1T=moved(packed.tokens_T[here]).unsqueeze(0),
        position_ids_1T=moved(packed.position_ids_T[here]).unsqueeze(0),
        targets_T=moved(packed.targets_T[here]),
        trajectory_T=moved(trajectory_T),
        wanted=moved((trajectory_T >= 0).nonzero().flatten()),
        rollout_log_probs_T=moved(packed.rollout_log_probs_T[here]),
        advantages_N=moved(packed.advantages_N),
        weights_N=moved(packed.weights_N),
        group_statistics={name: moved(values_N) for name, values_N in packed.group_statistics.items()},
        sample_ids=packed.sample_ids,
        sequences=packed_sequences(packed.boundaries, context_size=state.cp_size, device=state.device),
        num_response_tokens=int((packed.trajectory_T >= 0).sum()),
        routing=make_routing(packed.padding_T[here], None if packed.routes_T is None else packed.routes_T[here], state),
    )
