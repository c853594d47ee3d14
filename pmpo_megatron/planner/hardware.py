"""What the planner assumes of machines. Every figure is stated here, with its source, and can be overridden."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.units import GIB


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU and how GPUs are connected. Rates are of one GPU and one direction.

    Peaks are those of NVIDIA's data sheets (H100 SXM5: 989 TFLOP/s dense bf16, 3.35 TB/s, NVLink 900 GB/s in both
    directions together), in nodes of 8 with one network card for each GPU. The shares of the peaks that programs reach
    are assumptions of ours: measure yours, and override them with `dataclasses.replace`.
    """

    name: str
    memory_gib: float  # what PyTorch reports, of nominally 80 or 141 GB
    peak_flops: float  # bf16, dense
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    gpus_per_node: int = 8
    host_gib: float = 1024.0  # of a node: an assumption
    reserved_gib: float = 3.0  # a trainer's CUDA context, NCCL's buffers, libraries
    engine_context_gib: float = 1.0  # of a rollout engine on the same GPU, outside its share: its context, buckets of weights
    fragmentation: float = 0.05  # share of the activations lost between allocations
    matmul_efficiency: float = 0.45  # share of the peak that training's matrix products reach
    decode_memory_efficiency: float = 0.6  # share of the memory's rate that decoding reaches
    decode_overhead_s: float = 0.004  # of each decoding step: scheduling and sampling
    link_efficiency: float = 0.75
    host_link_bytes_per_s: float = 25e9  # pinned memory, all GPUs of a node at once: an assumption, 40% of PCIe 5.0 x16
    bucket_s: float = 1e-3  # of a bucket of weights: what both ends say of it; measured on a busy CPU

    def link(self, span: int) -> float:
        """Bytes per second and GPU between neighbours in a group that reaches over ``span`` consecutive ranks."""
        bandwidth = self.nvlink_bytes_per_s if span <= self.gpus_per_node else self.network_bytes_per_s
        return bandwidth * self.link_efficiency


HARDWARE = {
    "h100-80gb": Hardware("H100 80GB", 79.1, 989e12, 3.35e12, 450e9, 50e9),
    "a100-80gb": Hardware("A100 80GB", 79.1, 312e12, 2.0e12, 300e9, 25e9, matmul_efficiency=0.55, host_link_bytes_per_s=12.5e9),
    "h200-141gb": Hardware("H200 141GB", 139.8, 989e12, 4.8e12, 450e9, 50e9),
}
DEFAULT = "h100-80gb"


def hardware_named(name: str) -> Hardware:
    """Raises ConfigError for a name that is not in `HARDWARE`."""
    if name not in HARDWARE:
        raise ConfigError("hardware", f"{name!r} is not one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def hardware_here() -> Hardware:
    """This machine's GPUs: memory as it is here, and rates of the kind that their name says, or of the default kind.

    The default kind where there is no GPU.
    """
    if not torch.cuda.is_available():
        return HARDWARE[DEFAULT]
    name = torch.cuda.get_device_name(0)
    kind = next((known for key, known in HARDWARE.items() if key.split("-")[0] in name.lower()), HARDWARE[DEFAULT])
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    return replace(kind, name=name, memory_gib=memory, host_gib=host_bytes() / GIB)


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
