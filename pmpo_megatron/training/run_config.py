"""The configuration of a run: every section in one class, and the checks that need more than one section."""

from __future__ import annotations

from dataclasses import dataclass

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
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig, check_temperature


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
    asynchronous: bool = setting(False, "generate round k+1 while round k trains: rollouts are one round stale")


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
    max_problems: int = setting(256, "at most this many of them, the first ones", minimum=1)
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
    bridge: BridgeConfig = setting(BridgeConfig)
    rewards: RewardConfig = setting(RewardConfig)
    checkpoint: CheckpointConfig = setting(CheckpointConfig)
    monitor: MonitorConfig = setting(MonitorConfig)
    evaluation: EvaluationConfig = setting(EvaluationConfig)
    guards: GuardConfig = setting(GuardConfig)
