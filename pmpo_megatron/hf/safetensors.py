"""Streaming Hugging Face checkpoints: one tensor in memory at a time when reading, one shard when writing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pmpo_megatron.errors import MappingError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")  # config, generation config, tokenizer of any kind


class SafetensorsReader:
    """Tensors of a checkpoint directory by name.

    Raises:
        MappingError: no safetensors there (pickle files are not read), a file is missing or damaged; names the file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._open: dict[Path, Any] = {}
        self.files = self._find()

    @property
    def names(self) -> list[str]:
        return list(self.files)

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor called ``name``, on CPU, memory-mapped until it is used."""
        if name not in self.files:
            raise MappingError(f"{self.directory}: tensor {name} is missing")
        return self._handle(self.files[name]).get_tensor(name)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise MappingError(f"{path}: cannot be read as safetensors: {error}") from None
        return self._open[path]

    def _find(self) -> dict[str, Path]:
        if (self.directory / INDEX).exists():
            weight_map = json.loads((self.directory / INDEX).read_text())["weight_map"]
            return {name: self.directory / file for name, file in weight_map.items()}
        if (self.directory / SINGLE).exists():
            return {name: self.directory / SINGLE for name in self._handle(self.directory / SINGLE).keys()}
        pickles = sorted(path.name for path in self.directory.glob("*.bin"))
        hint = f"; {', '.join(pickles)} are pickle files, which are not read by default" if pickles else ""
        raise MappingError(f"{self.directory}: holds neither {SINGLE} nor {INDEX}{hint}")


class SafetensorsWriter:
    """Writes a sharded checkpoint: tensors are collected until a shard is full, so memory stays at one shard.

    Args:
        directory: exists already.
        shard_bytes: a file is written when its tensors reach this size.
    """

    def __init__(self, directory: str | Path, *, shard_bytes: int = 2 << 30) -> None:
        self.directory, self.shard_bytes = Path(directory), shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes ``tensor`` (copied if it is a view, because a file holds only whole tensors)."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Writes the last shard, gives the files their final names, and writes the index where there are several."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.directory / _part(number)).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        if self._pending:
            self._shards.append(list(self._pending))
            save_file(self._pending, self.directory / _part(len(self._shards)), metadata={"format": "pt"})
            self._pending, self._pending_bytes = {}, 0


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copies configuration, generation configuration and tokenizer files, not weights or their index."""
    for pattern in SIDE_FILES:
        for path in Path(source).glob(pattern):
            if path.name != INDEX and not path.name.endswith(".index.json"):
                shutil.copyfile(path, Path(target) / path.name)
