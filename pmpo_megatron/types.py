"""The records that travel between the stages of a training step.

Order of travel: Prompt -> RolloutGroup of Rollouts -> Samples -> MicroBatches. All are frozen: a stage makes new
records and never edits those it was handed. Token ids travel end to end; text exists for rewards and for people.

Shape suffixes: N trajectories of a micro-batch, T packed tokens of a micro-batch, S packed sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once. ``answers`` are the accepted answers; ``index`` is its row in the data set."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    answers: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    ``token_ids`` are the response tokens as sampled, the stop token included. ``log_probs`` (float32, same length)
    are those of the distribution that was sampled from: temperature and truncation applied.
    ``versions`` (int32, same length) is the number of the weights that made each token, counted by the engine's updates.
    """

    token_ids: tuple[int, ...]
    log_probs: np.ndarray
    text: str
    finish_reason: str  # "stop": a stop token or string; "length": the token limit
    versions: np.ndarray
    seed: int

    @property
    def policy_version(self) -> int:
        """The oldest version that made one of the tokens."""
        return int(self.versions.min())


@dataclass(frozen=True)
class RolloutGroup:
    """The responses to one prompt: a GRPO group."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Sample:
    """One trajectory, scored and ready to train on.

    ``sample_id`` is unique within the round; ``group_id`` is the position of its group in the round.
    ``weight`` is c_i of the whole optimizer step (docs/objective.md, "The formulas"), so micro-batches only ever add up.
    """

    sample_id: int
    group_id: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout_log_probs: np.ndarray  # float32 [len(response_ids)]
    truncated: bool  # the response hit the token limit
    reward: float
    advantage: float
    weight: float
    policy_version: int

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class MicroBatch:
    """Whole trajectories packed one after another: the same on every tensor-, pipeline- and context-parallel rank.

    Every sequence is padded to the multiple that the parallel layout needs; padding at the tail that belongs to no
    trajectory is a sequence of its own. Targets are shifted before any context-parallel split, inside each sequence.
    ``trajectory_T[t]`` is the trajectory (0..N-1) whose *response* token is the target at ``t``, -1 everywhere else,
    so position ``t`` carries log pi(targets_T[t] | tokens up to t).
    """

    tokens_T: torch.Tensor  # int64 [T]
    targets_T: torch.Tensor  # int64 [T], 0 where there is none
    position_ids_T: torch.Tensor  # int64 [T], from 0 in every sequence
    trajectory_T: torch.Tensor  # int64 [T]
    rollout_log_probs_T: torch.Tensor  # float32 [T], 0 where trajectory_T is -1
    cu_seqlens: torch.Tensor  # int32 [S + 1], padded boundaries, cu_seqlens[-1] == T
    advantages_N: torch.Tensor  # float32 [N]
    weights_N: torch.Tensor  # float32 [N]
    sample_ids: tuple[int, ...]  # N of them; which Sample each trajectory is

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.numel()

    @property
    def num_trajectories(self) -> int:
        return len(self.sample_ids)
