"""What a plan consists of: the load of an optimizer step, the time of a round, and the plan itself."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.parallel.shards import sequence_multiple
from pmpo_megatron.planner.checkpoint import CheckpointBytes
from pmpo_megatron.planner.engine import EngineBytes, GenerationTime
from pmpo_megatron.planner.hardware import Hardware
from pmpo_megatron.planner.memory import GpuMemory
from pmpo_megatron.planner.phases import Moved
from pmpo_megatron.planner.timing import StepTime, Work
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.units import round_up

FILL = 0.95  # of a micro-batch's budget, which packing reaches


@dataclass(frozen=True)
class Load:
    """What an optimizer step gives each data-parallel rank to do.

    Attributes:
        trajectories: of the whole step.
        longest: tokens of the longest trajectory, padded as packing does.
        mean: tokens of a trajectory on average, assumed.
        response: of them, tokens of the response.
        full_tokens: tokens of the fullest micro-batch on a context-parallel rank.
        most_micro_batches: if all trajectories are as long as they may be.
    """

    trajectories: int
    longest: int
    mean: float
    response: float
    full_tokens: float
    most_micro_batches: int
    work: Work

    @staticmethod
    def of(config: RunConfig, data_parallel: int, sequence: float | None) -> Load:
        parallel, budget = config.parallel, config.batch.max_tokens_per_micro_batch
        trajectories = config.batch.prompts_per_round * config.sampling.samples_per_prompt // config.batch.steps_per_round
        limit = config.data.max_prompt_tokens + config.sampling.max_tokens
        if sequence is not None and not 0 < sequence <= limit:
            raise ConfigError("sequence length", f"a mean of {sequence:g} tokens; the longest trajectory has {limit}")
        longest = round_up(limit, sequence_multiple(parallel))
        mean = sequence or limit / 2
        response = mean * config.sampling.max_tokens / limit
        multiple = parallel.pipeline if parallel.virtual_pipeline else 1
        mine = ceil(trajectories / data_parallel)
        count = round_up(max(1, ceil(mine * mean / (budget * FILL))), multiple)
        most = round_up(max(1, ceil(mine / max(1, budget // longest))), multiple)
        full = min(budget, mine * longest) / parallel.context
        work = Work(mine * mean / count / parallel.context, count, response / mean, mean)
        return Load(trajectories, longest, mean, response, full, most, work)


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a round's phases; ``rollouts`` is 0 for recorded ones. ``moving`` is of memory to the host and back."""

    rollouts: float
    scoring: float
    steps: float
    weights: float
    moving: float
    overlapped: bool

    @property
    def seconds(self) -> float:
        training = self.scoring + self.steps + self.weights + self.moving
        return max(self.rollouts, training) if self.overlapped else self.rollouts + training

    @property
    def training(self) -> float:
        return self.scoring + self.steps


@dataclass(frozen=True)
class Plan:
    """A run on stated hardware: memory, times, and what is wrong with it.

    Attributes:
        gpus: every kind of GPU in the run, in every phase that differs; the first is of rank 0.
        moved: to the host before rollouts and back.
        recompute: bytes of activations on the fullest GPU with each kind of recomputation, the rest as configured.
        checkpoint: what saving and loading one take beside training's memory.
        engine: on each of vLLM's GPUs; None where rollouts are recorded ones, or come from nodes of their own.
        problems: why the run cannot work as it is configured; empty if it fits.
        notes: what is worth changing all the same.
    """

    config: RunConfig
    world_size: int
    hardware: Hardware
    shape: ModelShape
    load: Load
    gpus: tuple[GpuMemory, ...]
    moved: Moved
    recompute: dict[str, float]
    engine: EngineBytes | None
    checkpoint: CheckpointBytes
    generation: GenerationTime | None
    step: StepTime
    round: RoundTime
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def fullest(self) -> GpuMemory:
        return min(self.gpus, key=lambda gpu: gpu.spare)

    @property
    def data_parallel(self) -> int:
        return self.config.parallel.data_parallel_size(self.world_size)
