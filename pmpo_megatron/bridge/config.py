"""How weights travel to the rollout engine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pmpo_megatron.config import Section, setting
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rollout.engine import HERE

ON_GPU = ("cuda_ipc", "nccl")
BESIDE = ("cuda_ipc", "shared_memory")  # between processes of one node


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(Section):
    """How weights travel to the rollout engine, and how it is checked that they arrived."""

    transport: str = setting(
        "auto",
        "shared_memory: of the host; cuda_ipc: GPU memory of the host, also where trainer and engine share GPUs; nccl: to GPUs "
        "that are the engine's alone; gloo: over the network from CPUs. auto: on the trainer's nodes cuda_ipc on GPUs and "
        "shared_memory on CPU, to other nodes nccl on GPUs and gloo on CPU",
        choices=("auto", "shared_memory", "cuda_ipc", "nccl", "gloo"),
    )
    bucket_mib: float = setting(
        64.0, "weights sent together; both ends hold two buckets for each rank that sends", unit="MiB", minimum=0.001
    )
    timeout_s: float = setting(300.0, "longest wait of either end for the other's part of a bucket", unit="s", minimum=0.001)
    address: str | None = setting(
        None, "name or address of rank 0's host for workers on other nodes, which connect to it; null: the one that leads there"
    )
    directory: str | None = setting(None, "transport shared_memory: where its files are put; null: /dev/shm")
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

    Where one of them is the trainer's, all are.

    Raises:
        ConfigError: it cannot work there.
    """
    beside = HERE in hosts
    if transport == "auto":
        near, far = ("cuda_ipc", "nccl") if device == "cuda" else ("shared_memory", "gloo")
        return near if beside else far
    if transport in ON_GPU and device != "cuda":
        raise ConfigError("bridge.transport", f"{transport} needs a trainer on GPUs; on CPU use shared_memory or gloo")
    if transport == "nccl" and beside:
        raise ConfigError("bridge.transport", "nccl cannot reach an engine that shares its GPU with the trainer; use cuda_ipc")
    if transport in BESIDE and not beside:
        raise ConfigError("bridge.transport", f"{transport} cannot reach nodes of the engine's own; use auto, nccl or gloo")
    return transport
