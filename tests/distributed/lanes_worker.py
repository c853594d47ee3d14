"""What the processes of the tests of lanes run: every rank takes what it hands over, on one layout after another."""

from __future__ import annotations

from pmpo_megatron.bridge.buckets import title
from pmpo_megatron.bridge.lanes import LanePlan, Shards
from pmpo_megatron.bridge.source import WeightSource
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.parallel.collectives import gather_objects
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down


def take_shares(path: str, layouts: dict[str, dict], places: dict[str, tuple]) -> dict:
    """By layout and place: the plan of the buckets, and this rank's pieces by title and the bytes that it received.

    A place is (ranks on each node, the nodes of the engines' workers, whether the trainer's ranks there have the lanes).
    """
    found = {}
    for layout, settings in layouts.items():
        parallel = ParallelConfig(**settings)
        state = initialize(parallel, device="cpu")
        policy = Policy.build(ModelConfig(path=path), None, parallel, state)
        held = gather_objects(Shards.of(state), state)
        for place, (per_node, workers, beside) in places.items():
            source, nodes = WeightSource(policy), [rank // per_node for rank in range(state.world_size)]
            common = dict(beside=beside, dtype=source.dtype, limit=2048)
            plan = LanePlan(policy.mapping.entries, held, nodes, workers, **common)
            mine = [piece for takers, piece in plan.pieces if state.rank in takers]
            found[layout, place] = {
                "ranks": plan.ranks,
                "turns": plan.turns,
                "rows": {title(p): rows.clone() for rows, p in zip(source.stream(plan.pieces), mine, strict=True)},
                "share": [title(piece) for bucket in plan.share(state.rank) for piece in bucket],
                "received": source.received_bytes,
            }
        shut_down(keep_world=True)
    shut_down()
    return found
