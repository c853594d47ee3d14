"""How long new weights take into the rollout engine, by counted bytes.

Legend: W bytes of all weights, bf16; n lanes, ranks of a node that hand over a share each (`bridge.lanes`); P pipeline stages;
t the engine's tensor-parallel size.
"""

from __future__ import annotations

from pmpo_megatron.bridge.config import BridgeConfig
from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.hardware import Hardware
from pmpo_megatron.planner.parameters import total_parameters
from pmpo_megatron.rollout.config import RolloutConfig

FINGERPRINT = {"full": 13, "sample": 0, "off": 0}  # times a byte goes to or from memory in `fingerprint.weighted_sum`


def weights_seconds(
    shape: ModelShape,
    parallel: ParallelConfig,
    rollout: RolloutConfig,
    bridge: BridgeConfig,
    hardware: Hardware,
    *,
    world_size: int,
) -> float:
    """Seconds of one update; nothing is taken to overlap.

    Bring: each lane gets W/n at most from other stages, which send one after another. Hand over: beside the trainer a worker
    reads what the other lanes have over NVLink, once for its fingerprint and once to load it; to nodes of its own each lane
    sends W/n by its own network card, where NCCL spreads it over the node's cards. In its memory a worker takes fingerprints,
    puts shards together (one read, one write), and loads its part of 1/t (two copies). For each bucket there are messages.
    """
    whole = 2 * total_parameters(shape)
    lanes = min(world_size, hardware.gpus_per_node)
    bring = whole / lanes / hardware.link(world_size) if parallel.pipeline > 1 else 0.0
    if rollout.nodes == "own":
        hand_over = whole / lanes / hardware.network_bytes_per_s / hardware.link_efficiency
        hand_over += whole / hardware.link(rollout.tensor_parallel)
    else:
        reads = 1 if bridge.verify == "off" else 2
        hand_over = reads * whole * (lanes - 1) / lanes / hardware.link(lanes)
    passes = FINGERPRINT[bridge.verify] * (1 + 1 / lanes) + 2 + 4 / rollout.tensor_parallel
    memory = passes * whole / (hardware.memory_bytes_per_s * hardware.decode_memory_efficiency)
    return bring + hand_over + memory + whole / (bridge.bucket_mib * 2**20) * hardware.bucket_s
