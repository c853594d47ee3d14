"""Which tensor lies where: tensors packed one after another into buckets of bounded size. Plain values, also on the wire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

ALIGNMENT = 64  # bytes

Bucket = list[dict[str, Any]]  # of tensors: name, dtype, shape, offset


def plan_buckets(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, limit: int) -> list[Bucket]:
    """Buckets of at most ``limit`` bytes, in the order of ``shapes``; a tensor that is larger has one to itself."""
    buckets: list[Bucket] = []
    free = 0
    for name, shape in shapes.items():
        size = _aligned(torch.Size(shape).numel() * dtype.itemsize)
        if not buckets or size > free:
            buckets.append([])
            free = max(limit, size)
        bucket = buckets[-1]
        offset = bucket_bytes(bucket)
        bucket.append({"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "offset": offset})
        free -= size
    return buckets


def bucket_bytes(bucket: Bucket) -> int:
    """Bytes that ``bucket`` takes, alignment included."""
    return bucket[-1]["offset"] + _aligned(tensor_bytes(bucket[-1])) if bucket else 0


def tensor_bytes(tensor: Mapping[str, Any]) -> int:
    return torch.Size(tensor["shape"]).numel() * getattr(torch, tensor["dtype"]).itemsize


def tensors_in(bucket: Bucket, memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor of ``bucket``: views of ``memory``, uint8."""
    for tensor in bucket:
        data = memory[tensor["offset"] : tensor["offset"] + tensor_bytes(tensor)]
        yield tensor["name"], data.view(getattr(torch, tensor["dtype"])).view(tensor["shape"])


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
