"""Looks for the layout that trains fastest, and the engines that generate fastest, among those that fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.known_models import model_shape
from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.model.architecture import check_layout
from pmpo_megatron.parallel.shards import sequence_multiple
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.engine import engine_nodes, split_problem
from pmpo_megatron.planner.hardware import Hardware
from pmpo_megatron.planner.records import Plan
from pmpo_megatron.planner.run_plan import RECOMPUTE, plan
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.units import GIB, round_up

MARGIN_GIB = 2.0  # that a proposal leaves on the fullest GPU: activations are estimates
LEAST_PIECE = 1024  # tokens of a sequence on a context-parallel rank, below which splitting it cannot pay
BUDGET_UNIT = 1024


def best_layouts(
    config: RunConfig, world_size: int, hardware: Hardware, *, sequence: float | None = None, count: int = 3
) -> list[Plan]:
    """The ``count`` fastest plans that fit, with another layout, micro-batch size or recomputation than ``config``'s.

    Rollouts are left as they are; batch sizes too. Equal layouts appear once, with their best micro-batch.
    """
    shape = model_shape(config.model.path)
    best: dict[ParallelConfig, Plan] = {}
    for parallel in layouts(config, shape, world_size, hardware):
        for candidate in _variants(config, parallel):
            candidate_plan = plan(candidate, world_size, hardware, sequence=sequence, shape=shape)
            known = best.get(parallel)
            if _has_room(candidate_plan) and (known is None or candidate_plan.round.training < known.round.training):
                best[parallel] = candidate_plan
    return sorted(best.values(), key=_preference)[:count]


def best_engines(
    config: RunConfig, world_size: int, hardware: Hardware, *, sequence: float | None = None, count: int = 3
) -> list[Plan]:
    """The ``count`` plans with the shortest rounds that fit, with other engines, memory by turns and recomputation.

    Engines use the whole of a node, with the largest KV cache that has room, in whole GiB, and no more than all requests can
    fill. The trainer's layout is left as it is. What is simpler wins where it is hardly slower.
    """
    if not config.rollout.beside_trainer:
        return []
    shape, gpus = model_shape(config.model.path), min(hardware.gpus_per_node, world_size)
    plans = []
    for size in _powers_of_two(gpus):
        if gpus % size or split_problem(shape, size) is not None:
            continue
        for sleep, offload, recompute in product(*_memory_modes(config), RECOMPUTE):
            model = replace(config.model, offload=offload, recompute=recompute)
            rollout = replace(config.rollout, engines=gpus // size, tensor_parallel=size, sleep=sleep)
            rollout = replace(rollout, kv_cache_gib=1.0, gpu_memory_utilization=0.01)
            smallest = plan(replace(config, model=model, rollout=rollout), world_size, hardware, sequence=sequence, shape=shape)
            if (larger := _with_largest_cache(smallest)) is not None:
                plans.append(plan(larger, world_size, hardware, sequence=sequence, shape=shape))
    return sorted(filter(_has_room, plans), key=_round_preference)[:count]


def _memory_modes(config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of `RolloutConfig.sleep` and `ModelConfig.offload`, the simplest first."""
    if config.round.mode != "synchronous":
        return ("none",), ("none",)
    return ("none", "kv", "all"), ("none", "optimizer", "all")


def _round_preference(candidate: Plan) -> float:
    """Time of a round; whatever else is freed or moved counts as 0.5% slower."""
    sleeps, offloads = _memory_modes(candidate.config)
    steps = sleeps.index(candidate.config.rollout.sleep) + offloads.index(candidate.config.model.offload)
    return candidate.round.seconds * (1 + 0.005 * steps)


def _with_largest_cache(smallest: Plan) -> RunConfig | None:
    """The configuration of ``smallest``, where each engine has 1 GiB of KV cache, with as much as has room and is of use."""
    engine, config = smallest.engine, smallest.config
    slept = config.rollout.sleep != "none"
    with_cache = [gpu.spare for gpu in smallest.gpus if gpu.shared and not (slept and gpu.phase == "training")]
    if engine is None or not with_cache:
        return None
    nodes = engine_nodes(config.rollout, smallest.world_size, smallest.hardware)
    requests = config.batch.prompts_per_round * config.sampling.samples_per_prompt
    at_once = min(math.ceil(requests / (config.rollout.engines * nodes)), config.rollout.max_num_seqs)
    useful = at_once * smallest.load.longest * engine.kv_per_token / GIB
    size = math.floor(min(min(with_cache) / GIB - MARGIN_GIB + 1, math.ceil(useful)))
    if size < 1:
        return None
    asked = (engine.total / GIB + size) / smallest.hardware.memory_gib  # a GiB more than it needs, so that it starts
    rollout = replace(config.rollout, kv_cache_gib=float(size), gpu_memory_utilization=min(1.0, math.ceil(100 * asked) / 100))
    return replace(config, rollout=rollout)


def _has_room(candidate: Plan) -> bool:
    return candidate.fits and candidate.fullest.spare >= MARGIN_GIB * GIB


def _preference(candidate: Plan) -> float:
    """Training time, where every doubling of the processes that share a model counts as 2% slower: smaller products."""
    return candidate.round.training * (1 + 0.02 * math.log2(candidate.config.parallel.model_size))


def layouts(config: RunConfig, shape: ModelShape, world_size: int, hardware: Hardware) -> Iterator[ParallelConfig]:
    """Every layout worth a look: tensor parallel inside a node, context parallel for long sequences only, whole experts."""
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    for tensor in _powers_of_two(hardware.gpus_per_node):
        for context in _powers_of_two(max(1, longest // LEAST_PIECE)):
            for pipeline in range(1, shape.num_layers + 1):
                if world_size % (tensor * context * pipeline):
                    continue
                for virtual in (None, 2, 4) if pipeline > 1 else (None,):
                    for expert in _powers_of_two(shape.experts.num_experts if shape.experts else 1):
                        parallel = replace(
                            config.parallel,
                            tensor=tensor,
                            sequence_parallel=tensor > 1,
                            context=context,
                            pipeline=pipeline,
                            virtual_pipeline=virtual,
                            expert=expert,
                            expert_tensor=1 if expert > 1 else None,  # whole experts make larger products
                        )
                        if _possible(parallel, shape, world_size):
                            yield parallel


def _possible(parallel: ParallelConfig, shape: ModelShape, world_size: int) -> bool:
    try:
        parallel.data_parallel_size(world_size)
        check_layout(shape, parallel)
    except ConfigError:
        return False
    return True


def _variants(config: RunConfig, parallel: ParallelConfig) -> Iterator[RunConfig]:
    """Micro-batches of one, two and four longest trajectories, and every kind of recomputation."""
    multiple = sequence_multiple(parallel)
    longest = round_up(config.data.max_prompt_tokens + config.sampling.max_tokens, multiple)
    for trajectories in (1, 2, 4):
        budget = round_up(longest * trajectories, BUDGET_UNIT)
        for recompute in RECOMPUTE:
            yield replace(
                config,
                parallel=parallel,
                model=replace(config.model, recompute=recompute),
                batch=replace(config.batch, max_tokens_per_micro_batch=budget),
            )


def _powers_of_two(limit: int) -> Iterator[int]:
    value = 1
    while value <= limit:
        yield value
        value *= 2
