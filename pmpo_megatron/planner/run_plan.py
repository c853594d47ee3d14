"""Whether a run fits its GPUs, what limits it and how long it takes: every part of the planner put together."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.parallel.shards import sequence_multiple
from pmpo_megatron.planner.activations import ActivationBytes, ActivationModel, activation_bytes
from pmpo_megatron.planner.engine import (
    EngineBytes,
    GenerationTime,
    engine_bytes,
    engine_nodes,
    engine_problems,
    generation_time,
)
from pmpo_megatron.planner.hardware import GIB, Hardware
from pmpo_megatron.planner.known_models import model_shape
from pmpo_megatron.planner.memory import GpuMemory, kinds_of_gpu
from pmpo_megatron.planner.parameters import state_bytes, total_parameters
from pmpo_megatron.planner.text import plan_lines
from pmpo_megatron.planner.timing import StepTime, TrainingCost, Work
from pmpo_megatron.run_config import RunConfig

RECOMPUTE = ("none", "selective", "full")
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
        longest = _round_up(limit, sequence_multiple(parallel))
        mean = sequence or limit / 2
        response = mean * config.sampling.max_tokens / limit
        multiple = parallel.pipeline if parallel.virtual_pipeline else 1
        mine = ceil(trajectories / data_parallel)
        count = _round_up(max(1, ceil(mine * mean / (budget * FILL))), multiple)
        most = _round_up(max(1, ceil(mine / max(1, budget // longest))), multiple)
        full = min(budget, mine * longest) / parallel.context
        work = Work(mine * mean / count / parallel.context, count, response / mean, mean)
        return Load(trajectories, longest, mean, response, full, most, work)


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a round's phases; ``rollouts`` is 0 for recorded ones."""

    rollouts: float
    scoring: float
    steps: float
    weights: float
    asynchronous: bool

    @property
    def seconds(self) -> float:
        training = self.scoring + self.steps + self.weights
        return max(self.rollouts, training) if self.asynchronous else self.rollouts + training

    @property
    def training(self) -> float:
        return self.scoring + self.steps


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        gpus: every kind of GPU in the run; the first is of rank 0.
        recompute: bytes of activations on the fullest GPU with each kind of recomputation, the rest as configured.
        engine: on each of vLLM's GPUs; None where rollouts are recorded ones, or come from servers.
        problems: why the run cannot work as it is configured; empty if it fits.
        notes: what is worth changing all the same.
    """

    config: RunConfig
    world_size: int
    hardware: Hardware
    shape: ModelShape
    load: Load
    gpus: tuple[GpuMemory, ...]
    recompute: dict[str, float]
    engine: EngineBytes | None
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

    def lines(self) -> list[str]:
        """The plan as text."""
        return plan_lines(self)


def plan(
    config: RunConfig,
    world_size: int,
    hardware: Hardware,
    *,
    sequence: float | None = None,
    shape: ModelShape | None = None,
) -> Plan:
    """Plans ``config`` on ``world_size`` GPUs, one process each.

    Args:
        sequence: mean tokens of a trajectory with its prompt; None: half of the longest. For times only, not for memory.
        shape: None: of the model in ``config.model.path``, see `model_shape`.

    Raises:
        ConfigError: the model's shape is not known, or the layout divides neither it nor ``world_size``.
    """
    shape = shape or model_shape(config.model.path)
    data_parallel = _data_parallel_size(config, world_size)
    load = Load.of(config, data_parallel, sequence)
    engine = engine_bytes(shape, config.rollout, hardware) if config.rollout.engine == "vllm" else None
    gpus = _gpus(config, world_size, hardware, shape, load, engine)
    step = _training_cost(config, world_size, hardware, shape, gpus).step(load.work)
    generation = _generation(config, world_size, shape, load, engine, hardware)
    return Plan(
        config=config,
        world_size=world_size,
        hardware=hardware,
        shape=shape,
        load=load,
        gpus=gpus,
        recompute=_activations_by_recompute(config, shape, load, min(gpus, key=lambda gpu: gpu.spare).stage),
        engine=engine,
        generation=generation,
        step=step,
        round=_round_time(config, shape, hardware, step, generation),
        problems=tuple(_problems(config, shape, load, engine, gpus)),
        notes=tuple(_notes(config, load, hardware, world_size, data_parallel)),
    )


def _data_parallel_size(config: RunConfig, world_size: int) -> int:
    try:
        return config.parallel.data_parallel_size(world_size)
    except ConfigError as error:
        raise error.within("parallel") from None


def _training_cost(config, world_size, hardware, shape, gpus) -> TrainingCost:
    return TrainingCost(
        shape=shape,
        parallel=config.parallel,
        hardware=hardware,
        world_size=world_size,
        recompute=config.model.recompute,
        chunk=config.model.log_prob_chunk,
        rank_parameters=max(gpu.state.gradients for gpu in gpus) / 4,  # gradients are float32
    )


def _gpus(config, world_size, hardware, shape, load: Load, engine: EngineBytes | None) -> tuple[GpuMemory, ...]:
    parallel, dtype = config.parallel, config.model.dtype.replace("auto", "bfloat16")
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    common = dict(replicas=replicas, dtype=dtype, distributed=config.optimizer.distributed)
    engine_size = config.rollout.engines * config.rollout.tensor_parallel if engine is not None else 0
    asks = config.rollout.gpu_memory_utilization * hardware.memory_gib * GIB
    found = []
    node_size = hardware.gpus_per_node if config.rollout.nodes == "all" else None
    for stage, shared in kinds_of_gpu(parallel, world_size=world_size, engine_size=engine_size, node_size=node_size):
        reference = state_bytes(shape, parallel, stage=stage, trained=False, **common).total
        activations = _activations(config, shape, load, stage, config.model.recompute)
        found.append(
            GpuMemory(
                stage=stage,
                state=state_bytes(shape, parallel, stage=stage, **common),
                reference=reference if config.objective.kl_coefficient else 0,
                activations=activations,
                engine=engine.total if shared else 0.0,
                engine_asks=asks if shared else 0.0,
                hardware=hardware,
            )
        )
    return tuple(found)


def _activations(config, shape, load: Load, stage: int, recompute: str) -> ActivationBytes:
    item = 4 if config.model.dtype == "float32" else 2
    return activation_bytes(
        ActivationModel(shape, config.parallel, recompute, item),
        tokens=load.full_tokens,
        stage=stage,
        micro_batches=load.most_micro_batches,
        chunk=config.model.log_prob_chunk,
    )


def _activations_by_recompute(config, shape, load: Load, stage: int) -> dict[str, float]:
    return {mode: _activations(config, shape, load, stage, mode).total for mode in RECOMPUTE}


def _generation(
    config, world_size: int, shape, load: Load, engine: EngineBytes | None, hardware: Hardware
) -> GenerationTime | None:
    if engine is None or engine.kv_cache <= 0:
        return None
    return generation_time(
        shape,
        config.rollout,
        config.sampling,
        engine,
        hardware,
        requests=config.batch.prompts_per_round * config.sampling.samples_per_prompt,
        context=load.mean,
        response=load.response,
        nodes=engine_nodes(config.rollout, world_size, hardware),
    )


def _round_time(config, shape, hardware, step: StepTime, generation: GenerationTime | None) -> RoundTime:
    """Weights go from rank 0 into vLLM; those of other pipeline stages are sent to rank 0 first."""
    bytes_moved = 2 * total_parameters(shape) * (2 - 1 / config.parallel.pipeline)
    passes = 2 if config.objective.kl_coefficient else 1
    steps = config.batch.steps_per_round
    return RoundTime(
        rollouts=generation.seconds if generation is not None else 0.0,
        scoring=passes * steps * step.scoring,
        steps=steps * step.seconds,
        weights=bytes_moved / hardware.host_bytes_per_s if config.rollout.engine == "vllm" else 0.0,
        asynchronous=config.round.asynchronous,
    )


def _problems(config, shape, load: Load, engine: EngineBytes | None, gpus) -> list[str]:
    problems = []
    if load.longest > config.batch.max_tokens_per_micro_batch:
        problems.append(
            f"batch.max_tokens_per_micro_batch: {config.batch.max_tokens_per_micro_batch} is below the longest trajectory, "
            f"{load.longest} tokens with padding"
        )
    if engine is not None:
        longest = config.data.max_prompt_tokens + config.sampling.max_tokens
        problems += engine_problems(shape, config.rollout, engine, longest=longest)
        engines, size, here = config.rollout.engines, config.rollout.tensor_parallel, gpus[0].hardware.gpus_per_node
        if engines * size > here:
            asked = f"rollout.tensor_parallel: {size}" if engines == 1 else f"rollout.engines: {engines} * {size}"
            problems.append(f"{asked} is more than a node's {here} GPUs; a vLLM runs on one node")
    worst = min(gpus, key=lambda gpu: gpu.spare)
    if worst.spare < 0:
        problems.append(
            f"memory: {worst.name} needs {worst.total / GIB:.1f} GiB of {worst.hardware.memory_gib:.1f}; most of it is "
            f"{worst.largest()}"
        )
    for gpu in gpus:
        free = gpu.hardware.memory_gib * GIB - gpu.state.total - gpu.reference - gpu.reserved
        if gpu.engine_asks and gpu.engine_asks > free:
            problems.append(
                f"rollout.gpu_memory_utilization: vLLM wants {gpu.engine_asks / GIB:.1f} GiB free when it starts, and the "
                f"trainer leaves {free / GIB:.1f} on {gpu.name}; lower it and set rollout.kv_cache_gib"
            )
    return problems


def _notes(config, load: Load, hardware: Hardware, world_size: int, data_parallel: int) -> list[str]:
    notes = []
    if load.trajectories % data_parallel:
        notes.append(f"{load.trajectories} trajectories of a step do not divide by data parallel {data_parallel}: some wait")
    if config.rollout.engine == "vllm" and config.rollout.kv_cache_gib is None:
        notes.append(
            "rollout.kv_cache_gib is not set: vLLM then measures what is free while the trainer allocates on the same GPU, "
            "and may find less than its share; set it"
        )
    used, there = config.rollout.engines * config.rollout.tensor_parallel, min(hardware.gpus_per_node, world_size)
    if config.rollout.engine == "vllm" and 2 * used <= there:
        notes.append(
            f"rollout.engines: vLLM runs on {used} of a node's {there} GPUs, the others wait for it; "
            f"{there // config.rollout.tensor_parallel} would use them all, at the same memory on each"
        )
    if config.rollout.engine == "vllm" and config.rollout.nodes == "first" and world_size > hardware.gpus_per_node:
        notes.append("rollout.nodes: vLLM runs on the first node, the others wait for it; all would use them all")
    if config.rollout.engine == "server":
        notes.append("rollouts come from servers: their memory and time, and the time to send them weights, are not counted")
    if config.parallel.tensor > 1 and not config.parallel.sequence_parallel:
        notes.append("parallel.sequence_parallel is off: with it activations outside matrix products are split too, at no cost")
    return notes


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
