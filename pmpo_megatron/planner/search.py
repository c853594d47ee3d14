"""Looks for the layout that trains fastest, and the engines that generate fastest, among those that fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.known_models import model_shape
from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.model.architecture import check_layout
from pmpo_megatron.parallel.shards import sequence_multiple
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.engine import split_problem
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
    """The ``count`` plans with the fastest rollouts that fit, with other `engines` and `tensor_parallel` than ``config``'s.

    All use the whole of a node, each with what KV cache and requests at once ``config`` says. Training is left as it is.
    """
    if not config.rollout.beside_trainer:
        return []
    shape, gpus = model_shape(config.model.path), min(hardware.gpus_per_node, world_size)
    plans = []
    for size in _powers_of_two(gpus):
        if gpus % size == 0 and split_problem(shape, size) is None:
            rollout = replace(config.rollout, engines=gpus // size, tensor_parallel=size)
            plans.append(plan(replace(config, rollout=rollout), world_size, hardware, sequence=sequence, shape=shape))
    return sorted(filter(_has_room, plans), key=lambda each: each.round.rollouts)[:count]


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
