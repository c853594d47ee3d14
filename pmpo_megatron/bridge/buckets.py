"""Which piece of which shard lies where in a bucket, and whole tensors from such pieces. Plain values, also on the wire."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from pmpo_megatron.hf.entries import Entry

ALIGNMENT = 64  # bytes

Piece = dict[str, Any]  # name of the Megatron parameter; which shard, of how many; its first row; shape, dtype, offset
Bucket = list[Piece]


def bucket_bytes(bucket: Bucket) -> int:
    """Bytes that ``bucket`` takes, alignment included."""
    return bucket[-1]["offset"] + _aligned(_piece_bytes(bucket[-1])) if bucket else 0


def pieces_in(bucket: Bucket, memory: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Every piece of ``bucket`` and its rows: views of ``memory``, uint8."""
    for piece in bucket:
        data = memory[piece["offset"] : piece["offset"] + _piece_bytes(piece)]
        yield piece, data.view(getattr(torch, piece["dtype"])).view(piece["shape"])


def pieces_of(entry: Entry, shard: int, shards: int, dtype: torch.dtype, limit: int) -> Iterator[Piece]:
    """``shard`` of ``shards`` of a parameter in pieces of at most ``limit`` bytes, or one row; each begins a bucket."""
    rows, *rest = entry.shard_shape(shards)
    step = max(1, limit // ALIGNMENT * ALIGNMENT // (torch.Size(rest).numel() * dtype.itemsize))
    for start in range(0, rows, step):
        shape = [min(step, rows - start), *rest]
        piece = {"name": entry.megatron, "shard": shard, "shards": shards, "start": start, "shape": shape}
        yield piece | {"dtype": str(dtype).removeprefix("torch."), "offset": 0}


def title(piece: Piece) -> str:
    """What a piece is called in messages, and by both ends."""
    start, rows = piece["start"], piece["shape"][0]
    return f"{piece['name']}, shard {piece['shard']} of {piece['shards']}, rows {start} to {start + rows}"


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Assembly:
    """Whole Hugging Face tensors from the pieces of every shard, in whatever order they come."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = {entry.megatron: entry for entry in entries}
        self._unfinished: dict[str, torch.Tensor] = {}
        self._missing: dict[str, int] = {}  # elements

    def add(self, piece: Piece, rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of what ``rows`` completes: views of them if they are the whole of it."""
        name, entry = piece["name"], self._entries[piece["name"]]
        whole = rows
        if tuple(rows.shape) != entry.full_shape:
            if name not in self._unfinished:
                self._unfinished[name] = torch.empty(entry.full_shape, dtype=rows.dtype, device=rows.device)
                self._missing[name] = self._unfinished[name].numel()
            whole = self._unfinished[name]
            _copy_rows(rows, piece["start"], entry.views(whole, piece["shard"], piece["shards"]))
            self._missing[name] -= rows.numel()
            if self._missing[name]:
                return
            del self._unfinished[name], self._missing[name]
        yield from zip(entry.hf, entry.split(whole), strict=True)


def check_complete(entries: Sequence[Entry], buckets: Iterable[Bucket]) -> str | None:
    """What is missing, extra or misshapen in ``buckets``, against the model's own list of parameters."""
    given: dict[str, list[Piece]] = defaultdict(list)
    for piece in (piece for bucket in buckets for piece in bucket):
        given[piece["name"]].append(piece)
    known = {entry.megatron: entry for entry in entries}
    if missing := sorted(known.keys() - given.keys()):
        return f"missing: {', '.join(missing[:4])}"
    if extra := sorted(given.keys() - known.keys()):
        return f"not in the model: {', '.join(extra[:4])}"
    for name, pieces in given.items():
        shards = pieces[0]["shards"]
        shape = known[name].shard_shape(shards)
        reached = [0] * shards
        for piece in sorted(pieces, key=lambda piece: piece["start"]):
            if piece["shards"] != shards or tuple(piece["shape"][1:]) != shape[1:]:
                return f"{title(piece)}: shape {piece['shape']}, where a shard of {shards} has {list(shape)}"
            if piece["start"] != reached[piece["shard"]]:
                return f"{title(piece)}: not every row comes once"
            reached[piece["shard"]] += piece["shape"][0]
        if set(reached) != {shape[0]}:
            return f"{name}: not every row comes once: {reached} of {shape[0]}"
    return None


def _copy_rows(rows: torch.Tensor, start: int, targets: Sequence[torch.Tensor]) -> None:
    """``rows`` from row ``start`` on of what ``targets`` are, one after another."""
    for target in targets:
        first, end = max(start, 0), min(start + len(rows), len(target))
        if first < end:
            target[first:end] = rows[first - start : end - start]
        start -= len(target)


def _piece_bytes(piece: Piece) -> int:
    return torch.Size(piece["shape"]).numel() * getattr(torch, piece["dtype"]).itemsize
