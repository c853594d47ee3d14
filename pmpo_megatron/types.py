"""The records that travel between the stages of a training step.

Order of travel: Prompt -> RolloutGroup of Rollouts -> Samples on rank 0; then, on every rank, the TrajectoryTable of all of
them and this rank's PackedTrajectories, which `model.micro_batch` prepares and scores. All are frozen: a stage makes new
records and never edits those it was handed. Token ids travel end to end; text exists for rewards and for people.

Token ids are int32 until they are packed: half the memory and traffic of int64, and no vocabulary comes near 2^31 tokens.
Packed they are int64, which PyTorch's `gather` takes.

Shape suffixes: N trajectories of a round or of a micro-batch, T packed tokens of a micro-batch, S packed sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

TokenIds = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
Routes = npt.NDArray[Any]  # of `RouteFormat.dtype`: each token's experts in every layer


def to_token_ids(values: Sequence[int]) -> TokenIds:
    """``values`` as an array that cannot be written to.

    Raises:
        ValueError: they are not whole numbers from 0 up to 2^31.
    """
    given = np.asarray(values if len(values) else np.empty(0, dtype=np.int32))
    if given.ndim != 1 or given.dtype.kind not in "iu" or (given.size and not 0 <= given.min() <= given.max() < 2**31):
        raise ValueError(f"token ids must be whole numbers from 0 up to 2^31: {str(values)[:80]}")
    token_ids = given.astype(np.int32)
    token_ids.flags.writeable = False
    return token_ids


@dataclass(frozen=True)
class RouteFormat:
    """How routes, the experts that a mixture sends each token to, are kept: [tokens, layers, per_token], whatever order.

    Every layer of the model has its place, dense ones too. A token of which no engine says where it went has ``unknown``
    everywhere: its router decides itself.
    """

    layers: int
    per_token: int  # experts
    num_experts: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that has a value to spare."""
        return np.dtype(np.uint8 if self.num_experts < 2**8 else np.uint16)

    @property
    def unknown(self) -> int:
        return int(np.iinfo(self.dtype).max)

    @property
    def token_bytes(self) -> int:
        return self.layers * self.per_token * self.dtype.itemsize

    def whole(self, known: npt.NDArray[Any], tokens: int) -> Routes:
        """Routes of ``tokens`` tokens, of which ``known`` has the first ones.

        Raises:
            ValueError: ``known`` has other layers, or another number of experts for each token.
        """
        if known.shape[1:] != (self.layers, self.per_token):
            raise ValueError(f"routes of {known.shape[1:]} layers and experts, the model has {self.layers, self.per_token}")
        routes = np.full((tokens, self.layers, self.per_token), self.unknown, dtype=self.dtype)
        routes[: len(known)] = known[:tokens]
        return routes


@dataclass(frozen=True, eq=False)
class Prompt:
    """One problem, tokenised once. ``answers`` are the accepted answers; ``index`` is its number among all prompts.

    ``metadata`` holds the further fields of its row, for rewards; ``source`` is the name of its source, '' where there is one
    alone; ``rewards`` are functions and weights that score it, None for those of the run.
    """

    index: int
    token_ids: TokenIds
    text: str
    answers: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    rewards: Mapping[str, float] | None = None


@dataclass(frozen=True, eq=False)
class Episode:
    """What a trajectory of several turns has beside its tokens (`rollout.episodes`).

    ``prompt_ids`` are what it began with; of each response token ``sampled`` says whether the policy sampled it or was told it.
    ``reward`` is None where the run's reward functions score the text. ``cached`` of ``asked`` tokens before the turns after
    the first were in the engine's cache. ``failure`` is the kind of what ended it, '' where it ended by itself.
    """

    prompt_ids: TokenIds
    sampled: Booleans
    reward: float | None
    correct: bool | None  # None: as the reward says
    turns: int
    version: int  # the oldest that made one of the tokens; without any, the engine's when it began
    cached: int = 0
    asked: int = 0
    failure: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled response, or the trajectory of an episode after its prompt.

    ``token_ids`` are the response tokens as sampled, the stop token included. ``log_probs`` (same length) are those of the
    distribution that was sampled from: temperature and truncation applied. ``versions`` (same length) is the number of the
    weights that made each token, counted by the engine's updates. Tokens that an episode told the policy have log-prob 0.
    ``routes`` are those of the prompt's tokens and then of these, where the engine was asked for them.
    """

    token_ids: TokenIds
    log_probs: Float32s
    text: str
    finish_reason: str  # "stop": a stop token or string; "length": the token limit
    versions: npt.NDArray[np.int32]
    seed: int
    routes: Routes | None = None
    cached: int = 0  # tokens of the prompt whose keys and values the engine had
    episode: Episode | None = None

    @property
    def policy_version(self) -> int:
        """The oldest version that made one of the tokens."""
        return int(self.versions.min()) if self.episode is None else self.episode.version

    @property
    def sampled(self) -> Booleans:
        """Of each token whether the policy sampled it."""
        return np.ones(len(self.token_ids), dtype=np.bool_) if self.episode is None else self.episode.sampled

    @property
    def num_sampled(self) -> int:
        return int(self.sampled.sum())


@dataclass(frozen=True)
class RolloutGroup:
    """The responses to one prompt: a GRPO group."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """One trajectory, scored and ready to train on.

    ``sample_id`` is its number in the round; ``group_id`` is the position of its group in the round.
    """

    sample_id: int
    group_id: int
    prompt_ids: TokenIds
    response_ids: TokenIds
    rollout_log_probs: Float32s  # of the response tokens
    truncated: bool  # the response hit the token limit
    advantage: float
    sampled: Booleans | None = None  # of the response tokens; the others were told to the policy. None: all
    routes: Routes | None = None  # as in `Rollout`

    @property
    def num_sampled(self) -> int:
        """Response tokens that the policy sampled: the trajectory's length in the objective."""
        return len(self.response_ids) if self.sampled is None else int(self.sampled.sum())


@dataclass(frozen=True, eq=False)
class TrajectoryTable:
    """What every rank knows of all N trajectories of a round, group after group; row i is the one with ``sample_id`` i."""

    group_ids_N: Integers
    prompt_lengths_N: Integers  # tokens
    response_lengths_N: Integers  # tokens
    sampled_lengths_N: Integers  # of them those that the policy sampled
    truncated_N: Booleans
    rewards_N: Float64s
    advantages_N: Float64s

    @staticmethod
    def of(samples: Sequence[Sample], rewards: Sequence[float]) -> TrajectoryTable:
        """The table of a whole round's ``samples`` and their ``rewards``."""
        return TrajectoryTable(
            group_ids_N=np.array([sample.group_id for sample in samples], dtype=np.int64),
            prompt_lengths_N=np.array([len(sample.prompt_ids) for sample in samples], dtype=np.int64),
            response_lengths_N=np.array([len(sample.response_ids) for sample in samples], dtype=np.int64),
            sampled_lengths_N=np.array([sample.num_sampled for sample in samples], dtype=np.int64),
            truncated_N=np.array([sample.truncated for sample in samples], dtype=np.bool_),
            rewards_N=np.array(rewards, dtype=np.float64),
            advantages_N=np.array([sample.advantage for sample in samples], dtype=np.float64),
        )

    @property
    def lengths_N(self) -> Integers:
        """Tokens of prompt and response."""
        return self.prompt_lengths_N + self.response_lengths_N


@dataclass(frozen=True, eq=False)
class PackedTrajectories:
    """Whole trajectories packed one after another, on the host: the same on every rank of a data-parallel replica.

    Every sequence is padded to the multiple that the parallel layout needs. Targets are shifted before any context-parallel
    split, inside each sequence. ``trajectory_T[t]`` is the trajectory (0..N-1) whose *sampled* token is the target at ``t``,
    -1 everywhere else, so position ``t`` carries log pi(targets_T[t] | tokens up to t). ``weights_N`` are c_i of the whole
    optimizer step (docs/objective.md, "The formulas"), so micro-batches only ever add up.
    """

    tokens_T: torch.Tensor  # int64 [T]
    targets_T: torch.Tensor  # int64 [T], 0 where there is none
    position_ids_T: torch.Tensor  # int64 [T], from 0 in every sequence
    padding_T: torch.Tensor  # bool [T]: no token of a trajectory
    trajectory_T: torch.Tensor  # int64 [T]
    rollout_log_probs_T: torch.Tensor  # float32 [T], 0 where trajectory_T is -1
    boundaries: tuple[int, ...]  # S + 1 positions, padding included; the last one is T
    advantages_N: torch.Tensor  # float32 [N]
    weights_N: torch.Tensor  # float32 [N]
    group_statistics: Mapping[str, torch.Tensor]  # float64 [N] each, by name: `algo.advantages.group_statistics`
    sample_ids: tuple[int, ...]  # N of them; which Sample each trajectory is
    routes_T: torch.Tensor | None = None  # [T, layers, experts of a token], as `RouteFormat` says; of padding unknown
