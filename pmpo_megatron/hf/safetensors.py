"""Reading Hugging Face checkpoints, one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pmpo_megatron.errors import MappingError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")  # config, generation config, tokenizer of any kind


def read_index(path: Path) -> dict[str, str]:
    """File of every tensor, as the index at ``path`` says.

    Raises:
        MappingError: it is damaged, or a file is outside the checkpoint's directory.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MappingError(f"{path}: damaged: {error!r}") from None
    if not isinstance(weight_map, dict):
        raise MappingError(f"{path}: damaged: weight_map is a {type(weight_map).__name__}, not a mapping")
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or "\0" in file
            or not file
            or PurePath(file).is_absolute()
            or ".." in PurePath(file).parts
        ):
            raise MappingError(f"{path}: tensor {name} is said to be in {file!r:.200}, which is no file of this directory")
    return weight_map


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
        try:
            return self._handle(self.files[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise MappingError(f"{self.files[name]}: tensor {name} cannot be read: {error}") from None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares what the files' headers say with ``shapes``; the weights themselves are not read.

        Raises:
            MappingError: a file is absent or damaged, or a tensor is absent, misshapen or of whole numbers; names it.
        """
        for name, shape in shapes.items():
            if name not in self.files:
                continue  # `WeightMapping.check_names` says so of all together
            path = self.files[name]
            try:
                header = self._handle(path).get_slice(name)
                stored, dtype = tuple(header.get_shape()), header.get_dtype()
            except (SafetensorError, OSError) as error:
                raise MappingError(f"{path}: tensor {name} cannot be read: {error}") from None
            if stored != shape:
                raise MappingError(f"{path}: {name} has shape {stored}; config.json says {shape}")
            if dtype not in FLOATS:
                raise MappingError(f"{path}: {name} is {dtype}; supported: {', '.join(FLOATS)}")

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise MappingError(f"{path}: cannot be read as safetensors: {error}") from None
        return self._open[path]

    def _find(self) -> dict[str, Path]:
        if (self.directory / INDEX).exists():
            return {name: self.directory / file for name, file in read_index(self.directory / INDEX).items()}
        if (self.directory / SINGLE).exists():
            return {name: self.directory / SINGLE for name in self._handle(self.directory / SINGLE).keys()}
        pickles = sorted(path.name for path in self.directory.glob("*.bin"))
        hint = f"; {', '.join(pickles)} are pickle files, which are not read by default" if pickles else ""
        raise MappingError(f"{self.directory}: holds neither {SINGLE} nor {INDEX}{hint}")


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copies configuration, generation configuration and tokenizer files, not weights or their index."""
    for pattern in SIDE_FILES:
        for path in Path(source).glob(pattern):
            if path.name != INDEX and not path.name.endswith(".index.json"):
                shutil.copyfile(path, Path(target) / path.name)
