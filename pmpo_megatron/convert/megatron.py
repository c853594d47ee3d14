"""Files of Megatron's dist_checkpointing (format torch_dist), written and read one tensor at a time, without Megatron.

The format is torch.distributed.checkpoint's: ``.metadata`` (which tensor lies where), ``*.distcp`` (every tensor or piece of
one as torch.save writes it, one after another), and Megatron's ``metadata.json`` and ``common.pt``. A parameter of all
layers is one tensor with the layer as its first dimension, cut into one piece for each layer; its name is that of
Transformer Engine's specification, whichever specification the model has (megatron-core 0.16 and 0.19,
TransformerBlock.sharded_state_dict).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from pmpo_megatron.checkpoint.index import INDEX_FILE, read_index
from pmpo_megatron.errors import CheckpointError
from pmpo_megatron.hf.entries import Entry, VocabularyEntry
from pmpo_megatron.hf.mapping import TRANSFORMER_ENGINE_NAMES

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
DATA_FILE = "__0_0.distcp"
LAYERS = "decoder.layers."
MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")
EXTRA_STATE = "_extra_state"
# Megatron's linear layers save an object of their own beside the weight; without Transformer Engine's float8 it is empty.
LAYER_OBJECTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def stored_name(megatron_name: str) -> tuple[str, int | None]:
    """(name in a checkpoint, layer or None) of a parameter named as in the local specification."""
    if not megatron_name.startswith(LAYERS):
        return megatron_name, None
    layer, _, rest = megatron_name.removeprefix(LAYERS).partition(".")
    fused = {plain: name for name, plain in TRANSFORMER_ENGINE_NAMES.items()}
    return LAYERS + fused.get(rest, rest), int(layer)


class MegatronWriter:
    """Writes one data file as tensors arrive, and what describes it at the end.

    Args:
        directory: exists already.
        num_layers: of the model.
    """

    def __init__(self, directory: Path, *, num_layers: int) -> None:
        self.directory, self.num_layers = directory, num_layers
        self._file = (directory / DATA_FILE).open("wb")
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._empty: dict[str, BytesStorageMetadata] = {}
        self._results: list[WriteResult] = []

    def add(self, megatron_name: str, tensor: torch.Tensor) -> None:
        """Writes a whole parameter (name of the local specification)."""
        name, layer = stored_name(megatron_name)
        if layer is None:
            shape, offset = tuple(tensor.shape), [0] * tensor.dim()
        else:
            tensor = tensor.unsqueeze(0)
            shape, offset = (self.num_layers, *tensor.shape[1:]), [layer] + [0] * (tensor.dim() - 1)
        whole = self._tensors.setdefault(
            name, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(shape), [])
        )
        if whole.properties.dtype != tensor.dtype:
            raise CheckpointError(
                f"{megatron_name} is {tensor.dtype}, in other layers {whole.properties.dtype}; choose one with --dtype"
            )
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage
        whole.chunks.append(ChunkStorageMetadata(torch.Size(offset), tensor.shape))
        start = self._file.tell()
        with _without_zip_checksums():
            torch.save(tensor, self._file)
        self._note(MetadataIndex(name, offset), start)

    def finish(self) -> None:
        """Writes the empty objects and the descriptions; everything is on disk afterwards."""
        empty = io.BytesIO()
        torch.save([None], empty)
        for layer in range(self.num_layers):
            for part in LAYER_OBJECTS:
                name = f"{LAYERS}{part}.{EXTRA_STATE}/shard_{layer}_{self.num_layers}"
                self._empty[name] = BytesStorageMetadata()
                start = self._file.tell()
                self._file.write(empty.getbuffer())
                self._note(MetadataIndex(name), start)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        torch.save({}, self.directory / "common.pt")
        (self.directory / "metadata.json").write_text(json.dumps(FORMAT))
        FileSystemWriter(self.directory).finish(Metadata({**self._tensors, **self._empty}), [self._results])

    def close(self) -> None:
        """Ends an attempt that failed."""
        self._file.close()

    def _note(self, index: MetadataIndex, start: int) -> None:
        length = self._file.tell() - start
        self._results.append(WriteResult(index, length, _StorageInfo(DATA_FILE, start, length)))


@contextlib.contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """torch.save without CRC-32 of its records: torch.load does not look at them, and they take longer than writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class MegatronReader:
    """Reads parameters of a checkpoint saved on any layout, whole.

    Raises:
        CheckpointError: ``directory`` is not such a checkpoint, or a file of it is missing or cut short; names it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metadata = read_index(directory / INDEX_FILE)
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self._check_files()

    @property
    def names(self) -> list[str]:
        """Stored names of the model's tensors (not the optimizer's)."""
        described = self.metadata.state_dict_metadata.items()
        tensors = [name for name, value in described if isinstance(value, TensorStorageMetadata)]
        return [name for name in tensors if name.startswith(MODEL_PARTS) and EXTRA_STATE not in name]

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._find(entry)[1].properties.dtype

    def check(self, entries: tuple[Entry, ...], *, num_layers: int) -> None:
        """Compares with the model before anything is read.

        Raises:
            CheckpointError: the checkpoint does not hold exactly these parameters, in their shapes; names the parameter.
        """
        used = set()
        for entry in entries:
            name, stored, layer = self._find(entry)
            shape, wanted = tuple(stored.size), self._shape(entry)
            if layer is not None:
                wanted = (num_layers, *wanted)
            padded = isinstance(entry, VocabularyEntry) and shape[0] >= wanted[0] and shape[1:] == wanted[1:]
            if shape != wanted and not padded:
                raise CheckpointError(f"{self.directory}: {name} has shape {shape}; config.json says {wanted}")
            used.add(name)
        if extra := sorted(set(self.names) - used):
            raise CheckpointError(f"{self.directory}: holds {', '.join(extra[:6])}, which the model of config.json has not")

    def __call__(self, entry: Entry) -> torch.Tensor:
        """The parameter of ``entry``, without padding rows.

        Raises:
            CheckpointError: it is absent, incomplete or damaged; names it.
        """
        name, stored, layer = self._find(entry)
        shape = self._shape(entry)
        target = torch.empty(shape, dtype=stored.properties.dtype)
        if layer is not None:
            wanted = ChunkStorageMetadata(torch.Size([layer] + [0] * len(shape)), torch.Size([1, *shape]))
        else:
            wanted = ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
        items = create_read_items_for_chunk_list(name, stored, [wanted])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise CheckpointError(f"{self.directory}: {entry.megatron} is incomplete")
        try:
            self._reader.read_data(LoadPlan(items), _IntoOneTensor(target.view(wanted.sizes)))
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{self.directory}: {entry.megatron} cannot be read: {error}") from None
        return target

    def _find(self, entry: Entry) -> tuple[str, TensorStorageMetadata, int | None]:
        """(stored name, description, layer): all layers stacked, or each under a name of its own (layer None)."""
        described = self.metadata.state_dict_metadata
        name, layer = stored_name(entry.megatron)
        numbered = LAYERS + f"{layer}." + name.removeprefix(LAYERS)
        for candidate, at in ((name, layer), (numbered, None)):
            stored = described.get(candidate)
            if isinstance(stored, TensorStorageMetadata):
                if at is not None and at >= stored.size[0]:
                    break
                return candidate, stored, at
        raise CheckpointError(f"{self.directory}: parameter {entry.megatron} is missing (looked for {name})")

    @staticmethod
    def _shape(entry: Entry) -> tuple[int, ...]:
        return entry.hf_shapes[0] if isinstance(entry, VocabularyEntry) else entry.full_shape

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for place in self.metadata.storage_data.values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        for name, size in needed.items():
            path = self.directory / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; {INDEX_FILE} refers to it")
            if path.stat().st_size < size:
                raise CheckpointError(f"{path}: has {path.stat().st_size} bytes instead of {size} or more")


class _IntoOneTensor(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self.target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    set_up_planner = create_local_plan = create_global_plan = finish_plan = load_bytes = _unused
