"""How many bytes a run's checkpoint takes at least, known before the first one is written."""

from __future__ import annotations

import math

import torch

from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.units import GIB

MOMENTS = 8  # Adam's two, float32
MASTER = 4  # the float32 copy of a weight


def checkpoint_bytes(mapping: WeightMapping, dtype: torch.dtype, *, distributed: bool) -> int:
    """Bytes of weights and optimizer state of all ranks together. Padding and descriptions come on top.

    Args:
        distributed: the optimizer's state is sharded; it then has a float32 copy of weights that are float32 already.
    """
    elements = sum(math.prod(shape) for shape in mapping.hf_shapes.values())
    return elements * (dtype.itemsize + MOMENTS + (MASTER if distributed or dtype != torch.float32 else 0))


def bytes_of(policy: Policy) -> int:
    """`checkpoint_bytes` of ``policy``."""
    dtype = next(policy.modules[0].parameters()).dtype
    if policy.optimizer is None:
        return checkpoint_bytes(policy.mapping, dtype, distributed=False)
    return checkpoint_bytes(policy.mapping, dtype, distributed=policy.optimizer.config.use_distributed_optimizer)


def describe_bytes(count: int) -> str:
    """``count`` in bytes, and in GiB where that says more."""
    return f"{count} bytes" + (f" ({count / GIB:.2f} GiB)" if count >= 2**27 else "")
