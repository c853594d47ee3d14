"""Which tensor lies where: tensors packed one after another into buckets of bounded size. Plain values, also on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

ALIGNMENT = 64  # bytes

Piece = dict[str, Any]  # name, dtype, shape of the whole tensor; rows [start, end) of it; offset in the bucket
Bucket = list[Piece]


def plan_buckets(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, limit: int) -> list[Bucket]:
    """Buckets of at most ``limit`` bytes, or one row, in the order of ``shapes``; a tensor that is larger comes in pieces."""
    buckets: list[Bucket] = [[]]
    for name, shape in shapes.items():
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        rows = max(1, limit // ALIGNMENT * ALIGNMENT // row_bytes)  # of a piece, at most
        for start in range(0, shape[0], rows):
            end = min(start + rows, shape[0])
            offset = bucket_bytes(buckets[-1])
            if offset and offset + _aligned((end - start) * row_bytes) > limit:
                buckets.append([])
                offset = 0
            piece = {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
            buckets[-1].append(piece | {"rows": [start, end], "offset": offset})
    return buckets


def bucket_bytes(bucket: Bucket) -> int:
    """Bytes that ``bucket`` takes, alignment included."""
    return bucket[-1]["offset"] + _aligned(_piece_bytes(bucket[-1])) if bucket else 0


def pieces_in(bucket: Bucket, memory: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Every piece of ``bucket`` and its rows: views of ``memory``, uint8."""
    for piece in bucket:
        data = memory[piece["offset"] : piece["offset"] + _piece_bytes(piece)]
        yield piece, data.view(getattr(torch, piece["dtype"])).view(_piece_shape(piece))


def whole_tensors(pieces: Iterable[tuple[Piece, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor): a piece that is whole as it is, others copied together."""
    whole = torch.empty(0)
    for piece, rows in pieces:
        start, end = piece["rows"]
        if (start, end) == (0, piece["shape"][0]):
            yield piece["name"], rows
            continue
        if start == 0:
            whole = torch.empty(piece["shape"], dtype=rows.dtype, device=rows.device)
        whole[start:end] = rows
        if end == piece["shape"][0]:
            yield piece["name"], whole
            whole = torch.empty(0)


def covered(buckets: Iterable[Bucket]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """(shape of every tensor by name, names of those whose rows do not come once each and in order)."""
    shapes: dict[str, tuple[int, ...]] = {}
    reached: dict[str, int] = {}
    wrong = set()
    for piece in (piece for bucket in buckets for piece in bucket):
        name, (start, end) = piece["name"], piece["rows"]
        shapes[name] = tuple(piece["shape"])
        if start != reached.get(name, 0):
            wrong.add(name)
        reached[name] = end
    return shapes, sorted(wrong | {name for name, end in reached.items() if end != shapes[name][0]})


def _piece_shape(piece: Piece) -> list[int]:
    start, end = piece["rows"]
    return [end - start, *piece["shape"][1:]]


def _piece_bytes(piece: Piece) -> int:
    return torch.Size(_piece_shape(piece)).numel() * getattr(torch, piece["dtype"]).itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
