"""Whether a run fits its GPUs, what limits it and how long it takes: every part of the planner put together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.known_models import model_shape
from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.model.architecture import expects_fused
from pmpo_megatron.planner.activations import ActivationBytes, ActivationModel, activation_bytes
from pmpo_megatron.planner.checkpoint import CheckpointBytes, checkpoint_bytes_of_node
from pmpo_megatron.planner.engine import (
    EngineBytes,
    GenerationTime,
    engine_bytes,
    engine_nodes,
    generation_time,
)
from pmpo_megatron.planner.hardware import Hardware
from pmpo_megatron.planner.memory import GpuMemory, kinds_of_gpu
from pmpo_megatron.planner.parameters import spread_parameters, state_bytes
from pmpo_megatron.planner.phases import Moved, by_phase
from pmpo_megatron.planner.records import Load, Plan, RoundTime
from pmpo_megatron.planner.timing import StepTime, TrainingCost
from pmpo_megatron.planner.verdict import find_notes, find_problems
from pmpo_megatron.planner.weights import weights_seconds
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.units import GIB, ITEM_SIZE, resolve_dtype

RECOMPUTE = ("none", "selective", "full")


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
    engine = engine_bytes(shape, config.rollout, hardware) if config.rollout.beside_trainer else None
    checkpoint = _checkpoint(config, world_size, hardware, shape)
    gpus = _gpus(config, world_size, hardware, shape, load, engine, checkpoint.gpu)
    step = _training_cost(config, world_size, hardware, shape, gpus).step(load.work)
    generation = _generation(config, world_size, shape, load, engine, hardware)
    moved = Moved.of(config, gpus)
    return Plan(
        config=config,
        world_size=world_size,
        hardware=hardware,
        shape=shape,
        load=load,
        gpus=gpus,
        moved=moved,
        recompute=_activations_by_recompute(config, shape, load, gpus),
        engine=engine,
        checkpoint=checkpoint,
        generation=generation,
        step=step,
        round=_round_time(config, world_size, shape, hardware, step, generation, moved),
        problems=tuple(find_problems(config, shape, engine, gpus, checkpoint, moved)),
        notes=tuple(find_notes(config, load, hardware, world_size, data_parallel)),
    )


def _data_parallel_size(config: RunConfig, world_size: int) -> int:
    try:
        return config.parallel.data_parallel_size(world_size)
    except ConfigError as error:
        raise error.within("parallel") from None


def _training_cost(
    config: RunConfig, world_size: int, hardware: Hardware, shape: ModelShape, gpus: Sequence[GpuMemory]
) -> TrainingCost:
    return TrainingCost(
        shape=shape,
        parallel=config.parallel,
        hardware=hardware,
        world_size=world_size,
        recompute=config.model.recompute,
        chunk=config.model.log_prob_chunk,
        rank_parameters=max(gpu.state.gradients for gpu in gpus) / 4,  # gradients are float32
        rank_expert_parameters=spread_parameters(shape, config.parallel),
    )


def _checkpoint(config: RunConfig, world_size: int, hardware: Hardware, shape: ModelShape) -> CheckpointBytes:
    return checkpoint_bytes_of_node(
        shape,
        config.parallel,
        world_size=world_size,
        node_size=hardware.gpus_per_node,
        dtype=resolve_dtype(config.model.dtype, "cuda"),
        distributed=config.optimizer.distributed,
    )


def _gpus(
    config: RunConfig,
    world_size: int,
    hardware: Hardware,
    shape: ModelShape,
    load: Load,
    engine: EngineBytes | None,
    checkpoint: float,
) -> tuple[GpuMemory, ...]:
    parallel, dtype = config.parallel, resolve_dtype(config.model.dtype, "cuda")
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    states = partial(state_bytes, shape, parallel, replicas=replicas, dtype=dtype, distributed=config.optimizer.distributed)
    engine_size = config.rollout.engines * config.rollout.tensor_parallel if engine is not None else 0
    asks = config.rollout.gpu_memory_utilization * hardware.memory_gib * GIB
    gpus: list[GpuMemory] = []
    node_size = hardware.gpus_per_node if config.rollout.nodes == "all" else None
    for stage, shared in kinds_of_gpu(parallel, world_size=world_size, engine_size=engine_size, node_size=node_size):
        reference = states(stage=stage, trained=False).total
        activations = _activations(config, shape, load, stage, config.model.recompute)
        everything = GpuMemory(
            stage=stage,
            shared=shared,
            state=states(stage=stage),
            reference=reference if config.objective.kl_coefficient else 0,
            activations=activations,
            engine=engine.total if shared and engine is not None else 0.0,
            engine_asks=asks if shared else 0.0,
            checkpoint=checkpoint,
            hardware=hardware,
        )
        gpus += by_phase(everything, config, engine)
    return tuple(gpus)


def _activations(config: RunConfig, shape: ModelShape, load: Load, stage: int, recompute: str) -> ActivationBytes:
    item = ITEM_SIZE[resolve_dtype(config.model.dtype, "cuda")]
    return activation_bytes(
        ActivationModel(shape, config.parallel, recompute, item, fused=expects_fused(config.model.layers)),
        tokens=load.full_tokens,
        stage=stage,
        micro_batches=load.most_micro_batches,
        chunk=config.model.log_prob_chunk,
    )


def _activations_by_recompute(config: RunConfig, shape: ModelShape, load: Load, gpus: Sequence[GpuMemory]) -> dict[str, float]:
    stage = min((gpu for gpu in gpus if gpu.phase != "rollouts"), key=lambda gpu: gpu.spare).stage
    return {mode: _activations(config, shape, load, stage, mode).total for mode in RECOMPUTE}


def _generation(
    config: RunConfig, world_size: int, shape: ModelShape, load: Load, engine: EngineBytes | None, hardware: Hardware
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


def _round_time(
    config: RunConfig,
    world_size: int,
    shape: ModelShape,
    hardware: Hardware,
    step: StepTime,
    generation: GenerationTime | None,
    moved: Moved,
) -> RoundTime:
    common = config.parallel, config.rollout, config.bridge, hardware
    weights = weights_seconds(shape, *common, world_size=world_size) if config.rollout.engine == "vllm" else 0.0
    passes = 2 if config.objective.kl_coefficient else 1
    steps = config.batch.steps_per_round
    scoring = passes * steps * step.scoring
    return RoundTime(
        rollouts=generation.seconds if generation is not None else 0.0,
        scoring=scoring,
        steps=steps * step.seconds,
        weights=weights,
        moving=moved.seconds(hardware, scoring),
        overlapped=config.round.mode != "synchronous",
    )
