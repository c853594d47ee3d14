"""Whole weights of a policy, put together without the bridge; and weights sent to an engine without a policy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pmpo_megatron.bridge.channel import Sender
from pmpo_megatron.bridge.lanes import LanePlan, Shards, fill
from pmpo_megatron.hf.mapping import WeightMapping, local_name
from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.collectives import gather_objects


def whole_weights(policy: Policy) -> dict[str, torch.Tensor]:
    """By Hugging Face name, on rank 0; nothing elsewhere. Collective."""
    shards = {local_name(name): policy.memory.weight(parameter) for name, parameter in policy.named_parameters()}
    held = Shards.of(policy.state)
    known = gather_objects((held, shards), policy.state)
    found = {}
    for entry in policy.mapping.entries if policy.state.is_main else ():
        by_number = {held.of_entry(entry)[0]: shards[entry.megatron] for held, shards in known if entry.megatron in shards}
        whole = unshard(entry, [by_number[number] for number in sorted(by_number)])
        found |= {name: tensor.clone() for name, tensor in zip(entry.hf, entry.split(whole), strict=True)}
    return found


def unshard(entry: Any, shards: list[torch.Tensor]) -> torch.Tensor:
    """The whole parameter; textbook: what every rank holds of each part, one rank after another."""
    if len(shards) == 1 or entry.tensor_parallel_dim is None:
        return shards[0]
    parts = [[shard.chunk(entry.parts)[part] for shard in shards] for part in range(entry.parts)]
    return torch.cat([torch.cat(pieces, entry.tensor_parallel_dim) for pieces in parts])


class Courier:
    """Sends tensors of Hugging Face names to all workers of an engine on this host, by one lane."""

    def __init__(self, engine: Any, path: str, dtype: torch.dtype = torch.float32, bucket_bytes: int = 1 << 20) -> None:
        self.engine, self.mapping = engine, WeightMapping(read_shape(path))
        workers = len(engine.collective_rpc("pmpo_describe"))
        held = [Shards((0, 1), (0, 1))]
        self.plan = LanePlan(self.mapping.entries, held, [0], ["0"] * workers, beside=True, dtype=dtype, limit=bucket_bytes)
        cpu = torch.device("cpu")
        self.sender = Sender("shared_memory", slot_bytes=bucket_bytes, workers=workers, device=cpu, timeout_s=100)

    def send(self, tensors: dict[str, torch.Tensor], version: int) -> list[dict]:
        """The workers' answers."""
        channel = {"name": str(id(self)), "lanes": {"0": [self.sender.begin()]}}
        manifest = {"version": version, "verify": "off", "rounding": "none", "turns": self.plan.turns, "channel": channel}
        whole = {e.megatron: e.merge([tensors[name] for name in e.hf]) for e in self.mapping.entries}
        rows = (whole[p["name"]][p["start"] : p["start"] + p["shape"][0]] for _, p in self.plan.pieces)
        with ThreadPoolExecutor(1) as thread:
            call = thread.submit(self.engine.collective_rpc, "pmpo_receive_weights", manifest)
            fill(self.sender, self.plan.share(0), rows, "off")
            answers = call.result()
        self.sender.finish()
        return answers
