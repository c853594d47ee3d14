"""The configuration of a run: every section in one class, and the checks that need more than one section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pmpo_megatron.algo.objective import ObjectiveConfig
from pmpo_megatron.bridge.config import BridgeConfig
from pmpo_megatron.checkpoint.config import CheckpointConfig
from pmpo_megatron.config import Section, setting
from pmpo_megatron.data.prompts import DataConfig
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig
from pmpo_megatron.monitor import MonitorConfig
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.rewards import RewardConfig
from pmpo_megatron.rollout.config import EpisodeConfig, RolloutConfig, SamplingConfig, check_temperature
from pmpo_megatron.yaml_values import show


@dataclass(frozen=True, kw_only=True)
class RunSection(Section):
    """Where a run lives and how long it goes on."""

    directory: str = setting("runs/run", "where checkpoints, metrics, rollouts and the report are written")
    rounds: int = setting(100, "rounds of rollouts and training", minimum=1, maximum=1_000_000_000)
    seed: int = setting(0, "seed of prompt order, sampling and mini-batch order", minimum=0)
    device: str = setting("auto", "where Megatron runs", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Section):
    """How a round's trajectories become optimizer steps and micro-batches."""

    prompts_per_round: int = setting(
        128, "prompts sampled in a round, each with its group of responses", minimum=1, maximum=1_000_000
    )
    steps_per_round: int = setting(8, "optimizer steps on a round's trajectories, each on its own share", minimum=1)
    max_tokens_per_micro_batch: int = setting(
        16384, "tokens packed into one micro-batch, over all context-parallel ranks", unit="tokens", minimum=16
    )
    mask_truncated: bool = setting(False, "give responses that hit the token limit no weight in the loss")

    def validate(self) -> None:
        if self.prompts_per_round % self.steps_per_round:
            raise ConfigError(
                "steps_per_round",
                f"{self.steps_per_round} must divide prompts_per_round = {self.prompts_per_round}; groups stay whole",
            )


@dataclass(frozen=True, kw_only=True)
class RoundConfig(Section):
    """Variations of the round."""

    dynamic_sampling: bool = setting(False, "replace groups whose rewards are all equal by those of further prompts")
    dynamic_sampling_attempts: int = setting(4, "at most this many further samplings in a round", minimum=1)
    mode: str = setting(
        "synchronous",
        "synchronous: a round is generated, then trained; overlapped: round k+1 is generated while round k trains; in_flight: "
        "generation goes on while training, and gets new weights in the middle of responses",
        choices=("synchronous", "overlapped", "in_flight"),
    )
    update: str = setting(
        "round", "in_flight: new weights after every round, or every optimizer step", choices=("round", "step")
    )
    max_staleness: int = setting(
        2,
        "in_flight: updates of the policy between a trajectory's first token and its training, at most",
        minimum=1,
        maximum=10**6,
    )
    old_log_probs: str = setting(
        "recomputed",
        "what the policy's ratios are taken to: the trainer's log-probs at the round's start, or the engine's own, which saves "
        "a forward pass",
        choices=("recomputed", "rollout"),
    )
    routing_replay: str = setting(
        "off",
        "mixtures of experts: a token goes to the experts that its router chooses each time; rollout: to those that the engine "
        "sent it to; old: to those that the trainer's own routers choose at the round's start",
        choices=("off", "rollout", "old"),
    )
    rejection: str = setting(
        "none",
        "tokens, or sequences by their mean, whose ratio trainer / engine is outside the bounds get no gradient",
        choices=("none", "token", "sequence"),
    )
    rejection_low: float = setting(0.5, "lower bound of that ratio", unit="ratio", above=0.0, maximum=1.0)
    rejection_high: float = setting(2.0, "upper bound of that ratio", unit="ratio", minimum=1.0)

    @classmethod
    def base_for(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``asynchronous: true`` is the older name of mode overlapped."""
        asynchronous = values.pop("asynchronous", False)
        if not isinstance(asynchronous, bool):
            raise ConfigError("asynchronous", f"{show(asynchronous)} is neither true nor false; its newer name is mode")
        return {"mode": "overlapped"} if asynchronous else {}


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Section):
    """When a run warns and when it stops."""

    max_skipped_steps: int = setting(3, "stop after this many non-finite optimizer steps in a row", minimum=1)
    mismatch_warn: float = setting(
        0.1, "warn where trainer and engine differ by more, mean over tokens", unit="nats", above=0.0
    )
    mismatch_stop: float | None = setting(
        None, "stop where trainer and engine differ by more, mean over tokens", unit="nats", above=0.0
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Held-out problems, scored during training with the rollout engine."""

    data: DataConfig | None = setting(None, "held-out problems; null: no evaluation")
    every_rounds: int = setting(10, "rounds between evaluations; also before the first and after the last", minimum=1)
    max_problems: int = setting(256, "at most this many of each source, the first ones", minimum=1)
    samples: int = setting(1, "responses to each problem", minimum=1, maximum=65536)
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy", minimum=0.0, maximum=1000.0)
    greedy: bool = setting(False, "beside the sampled responses also a greedy one: eval/greedy_accuracy_mean")

    def validate(self) -> None:
        check_temperature(self.temperature)
        if self.greedy and self.temperature == 0:
            raise ConfigError("greedy", "has no effect with temperature 0, where every response is greedy")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Everything that a run is told. One section per concern."""

    run: RunSection = setting(RunSection)
    model: ModelConfig = setting()
    parallel: ParallelConfig = setting(ParallelConfig)
    optimizer: OptimizerConfig = setting(OptimizerConfig)
    objective: ObjectiveConfig = setting(ObjectiveConfig)
    data: DataConfig = setting()
    batch: BatchConfig = setting(BatchConfig)
    round: RoundConfig = setting(RoundConfig)
    sampling: SamplingConfig = setting(SamplingConfig)
    rollout: RolloutConfig = setting(RolloutConfig)
    episode: EpisodeConfig = setting(EpisodeConfig)
    bridge: BridgeConfig = setting(BridgeConfig)
    rewards: RewardConfig = setting(RewardConfig)
    checkpoint: CheckpointConfig = setting(CheckpointConfig)
    monitor: MonitorConfig = setting(MonitorConfig)
    evaluation: EvaluationConfig = setting(EvaluationConfig)
    guards: GuardConfig = setting(GuardConfig)

    def reward_functions(self) -> list[str]:
        """Names of all functions that score a source of the data or of the held-out data."""
        configs = [data for data in (self.data, self.evaluation.data) if data is not None]
        parts = [part for data in configs for part in data.parts().values()]
        return list(dict.fromkeys(name for part in parts for name in part.rewards or self.rewards.functions))

    @property
    def versions_per_round(self) -> int:
        """How often a round gives the engine new weights."""
        return self.batch.steps_per_round if (self.round.mode, self.round.update) == ("in_flight", "step") else 1

    def validate(self) -> None:
        try:
            self.rewards.check_times(self.reward_functions())
        except ConfigError as error:
            raise error.within("rewards") from None
        compared = {
            "objective.importance": self.objective.importance != "none",
            "round.rejection": self.round.rejection != "none",
            "guards.mismatch_stop": self.guards.mismatch_stop is not None,
        }
        for name in (name for name, used in compared.items() if used and self.round.old_log_probs == "rollout"):
            raise ConfigError(
                name, "compares the trainer's log-probs with the engine's; round.old_log_probs must be recomputed"
            )
        if self.round.routing_replay == "rollout" and self.episode.function is not None:
            raise ConfigError("round.routing_replay", "rollout has no routes of the turns of episodes; use old")
        noted = {
            "round.routing_replay": self.round.routing_replay == "old",
            "objective.balance_coefficient": self.objective.balance_coefficient > 0,
        }
        for name in (name for name, used in noted.items() if used and self.round.old_log_probs == "rollout"):
            raise ConfigError(
                name, "takes what the trainer's routers do at the round's start; round.old_log_probs must be recomputed"
            )
        for name, mode in {"rollout.sleep": self.rollout.sleep, "model.offload": self.model.offload}.items():
            if mode != "none" and self.round.mode != "synchronous":
                text = f"{mode} with round.mode {self.round.mode}: engines generate while the trainer trains; set none"
                raise ConfigError(name, text)
        if self.round.mode != "in_flight":
            return
        if self.round.max_staleness < self.versions_per_round:
            raise ConfigError(
                "round.max_staleness",
                f"{self.round.max_staleness} must be at least {self.versions_per_round}, the updates in a round: while a round "
                "trains the next is generated",
            )
        if self.rollout.replay_from is not None or self.rollout.record_to is not None:
            raise ConfigError(
                "round.mode", "in_flight has no rounds of rollouts to record or replay; use another mode for that"
            )
