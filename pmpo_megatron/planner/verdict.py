"""Why a planned run cannot work, and what is worth changing all the same."""

from __future__ import annotations

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.model.architecture import expects_fused
from pmpo_megatron.planner.checkpoint import CheckpointBytes
from pmpo_megatron.planner.engine import EngineBytes, engine_problems
from pmpo_megatron.planner.hardware import Hardware
from pmpo_megatron.planner.memory import GpuMemory
from pmpo_megatron.planner.phases import Moved
from pmpo_megatron.planner.records import Load
from pmpo_megatron.training.checks import check_experts, check_lengths
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.units import GIB


def find_problems(
    config: RunConfig,
    shape: ModelShape,
    engine: EngineBytes | None,
    gpus: tuple[GpuMemory, ...],
    checkpoint: CheckpointBytes,
    moved: Moved,
) -> list[str]:
    """Why the run cannot work as it is configured; empty if it fits."""
    problems = []
    for check in (lambda: check_lengths(config, shape), lambda: check_experts(config, shape)):
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    if engine is not None:
        problems += engine_problems(shape, config.rollout, engine)
        engines, size, here = config.rollout.engines, config.rollout.tensor_parallel, gpus[0].hardware.gpus_per_node
        if engines * size > here:
            asked = f"rollout.tensor_parallel: {size}" if engines == 1 else f"rollout.engines: {engines} * {size}"
            problems.append(f"{asked} is more than a node's {here} GPUs; a vLLM runs on one node")
    host = gpus[0].hardware.host_gib
    pinned = moved.total * gpus[0].hardware.gpus_per_node
    if max(checkpoint.saving + pinned, checkpoint.loading) > host * GIB:
        beside = f" beside {pinned / GIB:.0f} of model.offload" if pinned else ""
        problems.append(
            f"checkpoints: saving one takes {checkpoint.saving / GIB:.0f} GiB{beside} and loading one "
            f"{checkpoint.loading / GIB:.0f} of a node's memory, which has {host:.0f}; spread the model over more nodes"
        )
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


def find_notes(config: RunConfig, load: Load, hardware: Hardware, world_size: int, data_parallel: int) -> list[str]:
    """What is worth changing although the run fits."""
    notes = []
    if load.trajectories % data_parallel:
        notes.append(f"{load.trajectories} trajectories of a step do not divide by data parallel {data_parallel}: some wait")
    if config.rollout.beside_trainer and config.rollout.kv_cache_gib is None:
        notes.append(
            "rollout.kv_cache_gib is not set: vLLM then measures what is free while the trainer allocates on the same GPU, "
            "and may find less than its share; set it"
        )
    used, there = config.rollout.engines * config.rollout.tensor_parallel, min(hardware.gpus_per_node, world_size)
    if config.rollout.beside_trainer and 2 * used <= there:
        notes.append(
            f"rollout.engines: vLLM runs on {used} of a node's {there} GPUs, the others wait for it; "
            f"{there // config.rollout.tensor_parallel} would use them all, at the same memory on each"
        )
    if config.rollout.beside_trainer and config.rollout.nodes == "first" and world_size > hardware.gpus_per_node:
        notes.append("rollout.nodes: vLLM runs on the first node, the others wait for it; all would use them all")
    if config.rollout.hosts:
        notes.append("vLLM runs on nodes of its own: its memory and time, and the time to send it weights, are not counted")
    if not expects_fused(config.model.layers):
        notes.append("layers are our own (model.layers, or no Transformer Engine here): they keep more for the backward pass")
    if config.parallel.tensor > 1 and not config.parallel.sequence_parallel:
        notes.append("parallel.sequence_parallel is off: with it activations outside matrix products are split too, at no cost")
    return notes
