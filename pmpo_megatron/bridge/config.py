"""How weights travel to the rollout engine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pmpo_megatron.config import Section, setting
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rollout.engine import HERE

ON_GPU = ("cuda_ipc", "nccl", "cuda_ipc+nccl")


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(Section):
    """How weights travel to the rollout engine, and how it is checked that they arrived."""

    transport: str = setting(
        "auto",
        "shared_memory: of the host; cuda_ipc: GPU memory of the host, also where trainer and engine share GPUs; nccl: to GPUs "
        "that are the engine's alone; gloo: over the network from CPUs; disk: files that both sides see. auto: on rank 0's "
        "node cuda_ipc on GPUs and shared_memory on CPU, to other nodes nccl on GPUs and gloo on CPU",
        choices=("auto", "shared_memory", "cuda_ipc", "nccl", "gloo", "disk"),
    )
    bucket_mib: float = setting(256.0, "weights sent together; both ends hold two buckets", unit="MiB", minimum=0.001)
    timeout_s: float = setting(300.0, "longest wait of either end for the other's part of a bucket", unit="s", minimum=0.001)
    address: str | None = setting(
        None, "name or address of rank 0's host for workers on other nodes, which connect to it; null: the one that leads there"
    )
    directory: str | None = setting(
        None, "transports shared_memory, disk: where their files are put; null: /dev/shm, or the temporary directory"
    )
    rounding: str = setting(
        "none",
        "the engine's weights rounded (matrices only), to study a mismatch with the trainer: to bf16, or to fp8 (e4m3, one "
        "scale for each tensor)",
        choices=("none", "bf16", "fp8"),
    )
    verify: str = setting(
        "full",
        "fingerprint of every received tensor: of all its bytes, of a sample, or none",
        choices=("full", "sample", "off"),
    )


def choose_transport(transport: str, *, device: str, hosts: Collection[str]) -> str:
    """The transport that ``transport`` means for a trainer on ``device`` (cpu, cuda) and an engine on ``hosts``.

    "a+b" is a to the workers on rank 0's host and b to the others.

    Raises:
        ConfigError: it cannot work there.
    """
    here, elsewhere = HERE in hosts, bool(set(hosts) - {HERE})
    if transport == "auto":
        near, far = ("cuda_ipc", "nccl") if device == "cuda" else ("shared_memory", "gloo")
        return f"{near}+{far}" if here and elsewhere else near if here else far
    if transport in ON_GPU and device != "cuda":
        raise ConfigError("bridge.transport", f"{transport} needs a trainer on GPUs; on CPU use shared_memory, gloo or disk")
    if transport == "nccl" and here:
        raise ConfigError("bridge.transport", "nccl cannot reach an engine that shares its GPU with the trainer; use cuda_ipc")
    if transport in ("cuda_ipc", "shared_memory") and elsewhere:
        raise ConfigError("bridge.transport", f"{transport} cannot reach other nodes (rollout.nodes); use auto, gloo or disk")
    return transport
