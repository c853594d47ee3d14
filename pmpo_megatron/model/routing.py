"""Where the routers of a mixture of experts send tokens: told or decided, noted, and drawn toward balance.

Legend: T tokens of a micro-batch on this context-parallel rank; t those of them that this rank's routers see, under sequence
parallelism its tensor-parallel part; E experts, K of them for each token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.parallel.collectives import sum_over
from pmpo_megatron.parallel.state import ParallelState
from pmpo_megatron.types import RouteFormat


def route_format(shape: ModelShape) -> RouteFormat | None:
    """How the model's routes are kept; None for one without experts."""
    experts = shape.experts
    return None if experts is None else RouteFormat(shape.num_layers, experts.per_token, experts.num_experts)


@dataclass(frozen=True, eq=False)
class Routing:
    """What the routers of this rank are told of one micro-batch, and what they then did, by layer of the whole model.

    Routes are [t, K] of `RouteFormat.dtype`. ``counts`` are int64 [E + 2]: how many tokens, padding excluded, went to each
    expert; how many had a route that was told; and for how many of these the router itself would have taken other experts.
    ``balance`` are float32 [E]: what the loss gains with an expert's probability, see `balance_weights`.
    """

    padding_t: torch.Tensor
    told: Mapping[int, torch.Tensor] = field(default_factory=dict)  # layers that it lacks decide themselves
    balance: Mapping[int, torch.Tensor] = field(default_factory=dict)
    routes: dict[int, torch.Tensor] = field(default_factory=dict)
    counts: dict[int, torch.Tensor] = field(default_factory=dict)


def make_routing(padding_T: torch.Tensor, routes_T: torch.Tensor | None, state: ParallelState) -> Routing:
    """For one micro-batch of this context-parallel rank; it is told ``routes_T`` [T, layers, K] where there are any."""
    told = {} if routes_T is None else dict(enumerate(_this_part(routes_T, state).to(state.device).unbind(1)))
    return Routing(_this_part(padding_T, state).to(state.device, non_blocking=True), told)


def _this_part(values_T: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """[t, ...]: of the tokens that this rank's routers see, as `parallel.shards` divides them."""
    return values_T.chunk(state.tp_size)[state.tp_rank] if state.config.sequence_parallel else values_T


class Router:
    """Stands where Megatron's RouterReplay would, in one layer: asked for the experts of every token.

    Megatron's own keeps all routers of a process in one list, a reference model's too, and takes routes in the order of calls
    (router_replay.py, 0.16.1 and 0.19.2). What a backward pass computes again is recognised by its gradients: the first time,
    inside a checkpoint, there are none. Backward passes come in the order of the forward passes.
    """

    def __init__(self, layer: int, routes: RouteFormat, *, of_probabilities: bool) -> None:
        self.layer, self.format, self.of_probabilities = layer, routes, of_probabilities
        self._now: Routing | None = None
        self._trains = False
        self._computed_again: deque[Routing | None] = deque()

    def begin(self, *, trains: bool) -> None:
        """Before a schedule; ``trains``: it has backward passes."""
        self._now, self._trains = None, trains
        self._computed_again.clear()

    def tell(self, routing: Routing | None) -> None:
        """Before the forward pass of a micro-batch; None: it decides itself, and notes nothing."""
        self._now = routing

    def get_replay_topk(self, scores_tE: torch.Tensor, topk: int, *_groups: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores [t, K], experts [t, K]), called by Megatron's topk_routing_with_score_function (moe_utils.py)."""
        again = torch.is_grad_enabled() and bool(self._computed_again)
        routing = self._computed_again.popleft() if again else self._now
        if self._trains and not torch.is_grad_enabled():
            self._computed_again.append(routing)
        values_tK, own_tK = torch.topk(scores_tE, topk, dim=1)
        if routing is None:
            return values_tK, own_tK
        experts_tK, told_tK = own_tK, routing.told.get(self.layer)
        if told_tK is not None:
            experts_tK = torch.where(told_tK == self.format.unknown, own_tK, told_tK.long())
            values_tK = scores_tE.gather(1, experts_tK)
        if not again:
            self._note(routing, experts_tK, own_tK, told_tK)
        balance_E = routing.balance.get(self.layer)
        if balance_E is not None and torch.is_grad_enabled():
            probabilities_tE = scores_tE if self.of_probabilities else scores_tE.float().softmax(dim=-1)
            values_tK = _WithLoss.apply(values_tK, (probabilities_tE[~routing.padding_t] @ balance_E).sum())
        return values_tK, experts_tK

    def _note(self, routing: Routing, experts_tK: torch.Tensor, own_tK: torch.Tensor, told_tK: torch.Tensor | None) -> None:
        real_t = ~routing.padding_t
        load_E = torch.bincount(experts_tK[real_t].flatten(), minlength=self.format.num_experts)
        known = other = load_E.new_zeros(1)
        if told_tK is not None:
            known_t = (told_tK[:, 0] != self.format.unknown) & real_t
            other_t = (own_tK.sort(dim=1).values != experts_tK.sort(dim=1).values).any(dim=1)
            known, other = known_t.sum()[None], (known_t & other_t).sum()[None]
        routing.counts[self.layer] = torch.cat([load_E, known, other])
        routing.routes[self.layer] = experts_tK.to(getattr(torch, self.format.dtype.name))


class _WithLoss(torch.autograd.Function):
    """``values``; in the backward pass ``loss`` is added to what is minimised."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], gradients[0].new_ones(())


def place_routers(module: Any, shape: ModelShape) -> tuple[Router, ...]:
    """Puts a `Router` into every layer of an unwrapped model chunk that has experts."""
    routes, experts, placed = route_format(shape), shape.experts, []
    if routes is None or experts is None:
        return ()
    for layer in module.decoder.layers:
        number = layer.layer_number - 1  # Megatron counts from 1, over the whole model
        if experts.sparse_layers[number]:
            layer.mlp.router.router_replay = Router(number, routes, of_probabilities=not experts.normalized)
            placed.append(layer.mlp.router.router_replay)
    return tuple(placed)


def add_counts(routings: Sequence[Routing], shape: ModelShape, state: ParallelState) -> torch.Tensor:
    """int64 [layers, E + 2]: `Routing.counts` over all micro-batches and ranks; of dense layers 0. Collective."""
    assert shape.experts is not None, "asked of mixtures alone"
    total = torch.zeros(shape.num_layers, shape.experts.num_experts + 2, dtype=torch.int64, device=state.device)
    for routing in routings:
        for layer, counts in routing.counts.items():
            total[layer] += counts
    return sum_over(state.world_group)(total)


def balance_weights(
    counts: torch.Tensor, shape: ModelShape, coefficient: float, state: ParallelState
) -> dict[int, torch.Tensor]:
    """Of every layer with experts, float32 [E]: the gradient of the loss with respect to a token's probability of each expert.

    The loss of a layer is coefficient * E * sum over experts of f * P (Fedus et al., arXiv 2101.03961, equation 4), where P
    is the mean probability over the step's tokens and f the share of their places that an expert got when they were scored:
    ``counts`` of the whole step. As f and the number of tokens are known beforehand, every token's part is, on whatever rank
    and in whatever micro-batch it is. Megatron's DDP divides gradients by dp * cp, so that they are multiplied by it here.
    """
    experts = shape.experts
    assert experts is not None, "asked of mixtures alone"
    load = counts[:, : experts.num_experts].double()
    places = load.sum(dim=1, keepdim=True).clamp(min=1)
    tokens = places / experts.per_token
    scale = coefficient * experts.num_experts * state.dp_size * state.cp_size
    weights = (scale * load / places / tokens).float()
    return {layer: weights[layer] for layer, sparse in enumerate(experts.sparse_layers) if sparse}
