"""Hugging Face weights as a stream: tensors read into memory of their own, safetensors files written as tensors arrive.

A memory-mapped reader would count every page touched as this process's memory until the file is closed; here a tensor's
bytes are read where it will live, and nothing remains of it when it is dropped.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open

from pmpo_megatron.errors import MappingError
from pmpo_megatron.hf.safetensors import INDEX, SINGLE, SafetensorsReader, read_index

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
HEADER_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``offset`` bytes into ``path`` (0 in pickle files, which torch reads whole)."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HfWeights(Protocol):
    """Weights of a checkpoint directory: ``info`` of all, and each tensor by its name."""

    info: dict[str, TensorInfo]

    def __call__(self, name: str) -> torch.Tensor: ...


def open_weights(directory: Path, *, allow_pickle: bool = False) -> HfWeights:
    """The weights in ``directory``: safetensors, or pickle files where there are none and ``allow_pickle`` is given.

    Raises:
        MappingError: there are none that may be read, or a file is missing or damaged; names the file.
    """
    has_safetensors = (directory / INDEX).exists() or (directory / SINGLE).exists()
    pickles = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if has_safetensors or not pickles:
        return SafetensorsWeights(directory)
    if not allow_pickle:
        raise MappingError(
            f"{directory}: holds pickle files only ({', '.join(pickles[:3])}{', ...' if len(pickles) > 3 else ''}); "
            "reading them needs --allow-pickle"
        )
    return PickleWeights(directory)


class SafetensorsWeights:
    """Tensors of safetensors files. Every file's header is read, and checked against the file's size, at once."""

    def __init__(self, directory: Path) -> None:
        self.info: dict[str, TensorInfo] = {}
        self._open: tuple[Path, FileIO] | None = None
        files = SafetensorsReader(directory).files
        headers = {path: _read_header(path) for path in sorted(set(files.values()))}
        for name, path in files.items():
            if name not in headers[path]:
                raise MappingError(f"{path}: tensor {name} is missing, though {INDEX} places it there")
            self.info[name] = headers[path][name]

    def __call__(self, name: str) -> torch.Tensor:
        info = self.info[name]
        if self._open is None or self._open[0] != info.path:
            self.close()
            self._open = info.path, info.path.open("rb", buffering=0)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        view, done, file = byte_view(tensor), 0, self._open[1]
        file.seek(info.offset)
        while done < info.num_bytes:  # one call reads 2 GiB at most
            count = file.readinto(view[done:])
            if not count:
                raise MappingError(f"{info.path}: ends inside tensor {name}")
            done += count
        return tensor

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


class PickleWeights:
    """Tensors of ``pytorch_model*.bin``: unpickled with ``weights_only``, one file in memory at a time."""

    def __init__(self, directory: Path) -> None:
        self._loaded: tuple[Path, dict[str, torch.Tensor]] | None = None
        if (directory / PICKLE_INDEX).exists():
            files = set(read_index(directory / PICKLE_INDEX).values())
        else:
            files = {PICKLE_SINGLE}
        self.info = {}
        for path in sorted(directory / file for file in files):
            for name, tensor in self._load(path).items():
                self.info[name] = TensorInfo(path, tensor.dtype, tuple(tensor.shape))

    def __call__(self, name: str) -> torch.Tensor:
        return self._load(self.info[name].path)[name].clone()

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None  # the file before is dropped first
            try:
                self._loaded = path, torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # unpickling raises whatever the damaged bytes lead to
                raise MappingError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        return self._loaded[1]


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file."""
    try:
        with safe_open(path, framework="pt", device="cpu"):  # checks the header and that the file has all its bytes
            pass
        with path.open("rb") as file:
            [length] = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise MappingError(f"{path}: cannot be read as safetensors: {error}") from None
    header.pop("__metadata__", None)
    start = HEADER_LENGTH.size + length
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise MappingError(f"{path}: tensor {name} is {entry['dtype']}; supported: {', '.join(DTYPES)}")
        tensors[name] = TensorInfo(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
    return tensors


class SafetensorsStream:
    """Writes sharded safetensors, each tensor as it comes: a file's header is written first, from ``plan``.

    Args:
        directory: exists already.
        plan: (name, dtype, shape) of every tensor, in the order in which they will be added.
        shard_bytes: a file holds at most so much, or one tensor.
    """

    def __init__(self, directory: Path, plan: Iterable[tuple[str, torch.dtype, Sequence[int]]], *, shard_bytes: int) -> None:
        self.directory = directory
        self._shards: list[list[tuple[str, torch.dtype, tuple[int, ...], int]]] = [[]]
        room = shard_bytes
        for name, dtype, shape in plan:
            size = torch.Size(shape).numel() * dtype.itemsize
            if self._shards[-1] and size > room:
                self._shards.append([])
                room = shard_bytes
            self._shards[-1].append((name, dtype, tuple(shape), size))
            room -= size
        self._expected = ((number, *item) for number, shard in enumerate(self._shards) for item in shard)
        self._file: BinaryIO | None = None
        self._number = -1

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes ``tensor``; it must be the next one of the plan."""
        number, planned, dtype, shape, _ = next(self._expected)
        assert (name, tensor.dtype, tuple(tensor.shape)) == (planned, dtype, shape), f"{name} comes where {planned} is due"
        file = self._file if self._file is not None and number == self._number else self._start(number)
        file.write(byte_view(tensor.contiguous()))

    def finish(self) -> None:
        """Closes the last file, and writes the index where there are several."""
        assert next(self._expected, None) is None, "not every tensor of the plan was added"
        self._close()
        if len(self._shards) > 1:
            weight_map = {item[0]: self._name(number) for number, shard in enumerate(self._shards) for item in shard}
            total = sum(item[3] for shard in self._shards for item in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2))

    def close(self) -> None:
        """Ends an attempt that failed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _start(self, number: int) -> BinaryIO:
        self._close()
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape, size in self._shards[number]:
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file, self._number = (self.directory / self._name(number)).open("wb"), number
        self._file.write(HEADER_LENGTH.pack(len(encoded)) + encoded)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self.close()

    def _name(self, number: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
