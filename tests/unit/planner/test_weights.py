"""The time of an update against what a plan of lanes really carries, and against the goals that it was made for."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from pmpo_megatron.bridge.buckets import bucket_bytes
from pmpo_megatron.bridge.config import BridgeConfig
from pmpo_megatron.bridge.lanes import LanePlan, Shards
from pmpo_megatron.hf.known_models import known_shape
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.hardware import HARDWARE
from pmpo_megatron.planner.parameters import total_parameters
from pmpo_megatron.planner.weights import weights_seconds
from pmpo_megatron.rollout.config import RolloutConfig

H100 = HARDWARE["h100-80gb"]
LLAMA, QWEN = known_shape("meta-llama/Llama-3.3-70B-Instruct"), known_shape("Qwen/Qwen2.5-7B")
ALL = RolloutConfig(nodes="all", tensor_parallel=8)


def seconds(shape, world_size, rollout=ALL, hardware=H100, bridge=BridgeConfig(), **layout):  # noqa: B008  frozen
    return weights_seconds(shape, ParallelConfig(**layout), rollout, bridge, hardware, world_size=world_size)


def test_seventy_billion_parameters_on_sixteen_nodes_take_five_seconds_and_seven_on_one_take_one():
    assert seconds(LLAMA, 128, tensor=8, pipeline=4) < 5
    assert seconds(QWEN, 8, RolloutConfig(tensor_parallel=4), tensor=2) < 1
    own = RolloutConfig(nodes="own", hosts=("a:1",), key_file="key", tensor_parallel=8)
    assert seconds(LLAMA, 128, own, tensor=8, pipeline=4) < 5


def test_more_nodes_take_no_longer():
    assert seconds(LLAMA, 512, tensor=8, pipeline=4) == seconds(LLAMA, 64, tensor=8, pipeline=4)


def test_only_what_is_done_is_counted():
    free = replace(H100, memory_bytes_per_s=1e30, bucket_s=0.0)
    whole, nvlink = 2 * total_parameters(LLAMA), H100.nvlink_bytes_per_s * H100.link_efficiency
    beside = seconds(LLAMA, 128, hardware=free, tensor=8)
    assert beside == pytest.approx(2 * whole * 7 / 8 / nvlink)
    assert seconds(LLAMA, 128, hardware=free, bridge=BridgeConfig(verify="off"), tensor=8) == pytest.approx(beside / 2)
    network = H100.network_bytes_per_s * H100.link_efficiency
    staged = seconds(LLAMA, 128, hardware=free, tensor=8, pipeline=4)
    assert staged == pytest.approx(beside + whole / 8 / network)
    assert seconds(LLAMA, 1, hardware=free) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shape, tensor", [(LLAMA, 8), (QWEN, 2), (QWEN, 1)], ids=["70B", "7B", "7B-replicas"])
def test_each_of_a_nodes_ranks_carries_its_eighth(shape, tensor):
    held = [Shards((rank % tensor, tensor), (rank % tensor, tensor)) for rank in range(16)]
    nodes, limit = [0] * 8 + [1] * 8, 64 * 2**20
    entries = WeightMapping(shape).entries
    plan = LanePlan(entries, held, nodes, ["0", "1"], beside=True, dtype=torch.bfloat16, limit=limit)
    carried = Counter()
    for rank in range(16):
        carried[rank] = sum(map(bucket_bytes, plan.share(rank)))
    share = 2 * total_parameters(shape) / 8
    assert all(amount == pytest.approx(share, rel=0.05) for amount in carried.values())
    buckets = sum(map(len, plan.turns))
    assert buckets < 1.6 * 2 * total_parameters(shape) / limit + 8, "what the handshakes are counted for"
