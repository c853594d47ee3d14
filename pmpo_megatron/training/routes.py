"""A round of a model with a mixture of experts: which routes the trainer replays, and how evenly its experts were used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.model.micro_batch import ScoredMicroBatch
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.model.routing import add_counts, route_format
from pmpo_megatron.monitor import Mean, Metric
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.types import RouteFormat


def replayed_routes(config: RunConfig, shape: ModelShape) -> RouteFormat | None:
    """The format of the routes that the engine gives with its responses; None: none are replayed, or the trainer's own."""
    return route_format(shape) if config.round.routing_replay == "rollout" else None


@dataclass(frozen=True)
class ExpertLoad:
    """Metrics of the routers, and for each layer (from 0, as text) how many tokens each expert got."""

    metrics: dict[str, Metric]
    tokens: dict[str, list[int]]


def measure_routing(steps: Sequence[Sequence[ScoredMicroBatch]], policy: Policy) -> ExpertLoad:
    """What the routers did when the round was scored, padding left out. Collective; equal on every rank.

    Empty for a model without experts, and where the engine's log-probs are taken and nothing is scored.
    """
    experts, routings = policy.shape.experts, [item.routing for step in steps for item in step]
    if experts is None:
        return ExpertLoad({}, {})
    counts = add_counts(routings, policy.shape, policy.state).cpu().numpy()
    load, known, other = counts[:, :-2], counts[:, -2].sum(), counts[:, -1].sum()
    layers = [layer for layer in range(policy.shape.num_layers) if load[layer].any()]
    if not layers:
        return ExpertLoad({}, {})
    shares = load[layers] / load[layers].mean(axis=1, keepdims=True)
    metrics: dict[str, Metric] = {
        "routing/busiest_expert": Mean.of(shares.max(axis=1)),
        "routing/unused_experts": Mean.of((shares == 0).mean(axis=1)),
    }
    if known:
        metrics["routing/other_than_engine"] = Mean(float(other), float(known))
    return ExpertLoad(metrics, {str(layer): np.asarray(load[layer]).tolist() for layer in layers})
