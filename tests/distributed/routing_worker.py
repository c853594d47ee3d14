"""What the processes of the routing tests run: routes that are told, replayed and drawn toward balance, on several layouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pmpo_megatron.algo.objective import ObjectiveConfig
from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.model.micro_batch import MicroBatch, prepare
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.routing import add_counts, route_format
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel.shards import join_context_shards
from pmpo_megatron.parallel.state import ParallelConfig, ParallelState, initialize, shut_down
from pmpo_megatron.types import RouteFormat, Sample
from tests.distributed.parity_worker import TEMPERATURE, gather_tensor, micro_batches, samples, staled
from tests.weights import whole_weights


def told_samples(routes: RouteFormat) -> list[Sample]:
    """`samples` with routes that no router would choose, and tokens without: the last of each, and one in six."""
    rng = np.random.default_rng(23)
    made = []
    for sample in samples()[0]:
        tokens = len(sample.prompt_ids) + len(sample.response_ids)
        chosen = rng.random((tokens, routes.layers, routes.num_experts)).argsort(axis=-1)[..., : routes.per_token]
        unknown = rng.random(tokens) < 1 / 6
        unknown[-1] = True
        chosen[unknown] = routes.unknown
        made.append(replace(sample, routes=chosen.astype(routes.dtype)))
    return made


def batches_of(state: ParallelState, routes: RouteFormat, told: bool) -> list[MicroBatch]:
    multiple = state.pp_size * (state.config.virtual_pipeline or 0)
    given = (told_samples(routes), routes) if told else ()
    return [prepare(packed, state) for packed in micro_batches(state.dp_size, state.dp_rank, multiple, *given)]


def run_layouts(layouts: list[dict], path: str) -> list[dict]:
    """For each layout: of told routes and of the routers' own, what scoring gave, and how a step changed the weights."""
    results = []
    for layout in layouts:
        options = dict(layout)
        recompute, distributed = options.pop("recompute", "none"), options.pop("distributed", True)
        parallel = ParallelConfig(**options)
        state = initialize(parallel, device="cpu")
        model = ModelConfig(path=path, recompute=recompute, log_prob_chunk=13)
        cases = {"told": dict(told=True, replay=True), "own": dict(replay=False), "old": dict(replay=True)}
        cases["balanced"] = dict(told=True, replay=True, coefficient=0.7)
        results.append({name: train(model, parallel, state, distributed, **case) for name, case in cases.items()})
        shut_down(keep_world=True)
    shut_down()
    return results


def train(
    model: ModelConfig,
    parallel: ParallelConfig,
    state: ParallelState,
    distributed: bool,
    *,
    replay: bool,
    told: bool = False,
    coefficient: float = 0.0,
) -> dict:
    """Log-probs and counts of the scoring, and the change of every Hugging Face tensor by two steps, on rank 0."""
    optimizer = OptimizerConfig(learning_rate=0.02, epsilon=0.05, clip_grad=0.0, distributed=distributed)
    policy = Policy.build(model, optimizer, parallel, state)
    batches = batches_of(state, route_format(read_shape(model.path)), told)
    scored = score(policy, batches, temperature=TEMPERATURE, replay=replay)
    log_probs = []
    if state.is_last_stage:
        for batch, item in zip(batches, scored, strict=True):
            shards = gather_tensor(item.old_log_probs_T, state.cp_group)
            log_probs.append((batch.sample_ids, join_context_shards(shards, batch.sequences.boundaries)))
    before = whole_weights(policy)
    stale = [staled(item) for item in scored]
    objective = ObjectiveConfig(balance_coefficient=coefficient)
    for _ in range(2):
        result = optimizer_step(policy, stale, objective=objective, progress=0.5, temperature=TEMPERATURE)
        assert result.applied, result.problem
    return {
        "log_probs": log_probs,
        "counts": add_counts([item.routing for item in scored], policy.shape, state),
        "loss": result.loss,
        "changes": {name: tensor - before[name] for name, tensor in whole_weights(policy).items()},
    }


def gradients_of_routers(path: str, coefficients: tuple[float, ...]) -> list[dict[str, torch.Tensor]]:
    """One process: for each load-balancing coefficient the gradient of every router, in a step from the same weights."""
    state = initialize(ParallelConfig(), device="cpu")
    found = []
    for coefficient in coefficients:
        optimizer = OptimizerConfig(distributed=False, clip_grad=0.0)
        policy = Policy.build(ModelConfig(path=path), optimizer, ParallelConfig(), state)
        batches = batches_of(state, route_format(policy.shape), told=True)
        scored = score(policy, batches, temperature=TEMPERATURE, replay=True)
        objective = ObjectiveConfig(balance_coefficient=coefficient)
        optimizer_step(policy, scored, objective=objective, progress=0.5, temperature=TEMPERATURE)
        found.append({name: p.main_grad.clone() for name, p in policy.named_parameters() if name.endswith("router.weight")})
    shut_down()
    return found
