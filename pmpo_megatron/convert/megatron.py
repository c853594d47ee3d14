"""Files of Megatron's dist_checkpointing (format torch_dist), written and read one tensor at a time, without Megatron.

The format is torch.distributed.checkpoint's: ``.metadata`` (which tensor lies where), ``*.distcp`` (every tensor or piece of
one as torch.save writes it, one after another), and Megatron's ``metadata.json`` and ``common.pt``. Parameters of several
layers or experts may be one tensor, cut into one piece for each (`stored_names`).
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

from pmpo_megatron.checkpoint.index import EXTRA_STATE, INDEX_FILE, read_index
from pmpo_megatron.convert.stored_names import Place, object_names, places
from pmpo_megatron.errors import CheckpointError
from pmpo_megatron.hf.entries import Entry, VocabularyEntry
from pmpo_megatron.hf.shape import ModelShape

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
DATA_FILE = "__0_0.distcp"
MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")


class MegatronWriter:
    """Writes one data file as tensors arrive, and what describes it at the end.

    Args:
        directory: exists already.
        shape: of the model.
    """

    def __init__(self, directory: Path, shape: ModelShape) -> None:
        self.directory, self.shape = directory, shape
        self._file = (directory / DATA_FILE).open("wb")
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._empty: dict[str, BytesStorageMetadata] = {}
        self._results: list[WriteResult] = []

    def add(self, megatron_name: str, tensor: torch.Tensor) -> None:
        """Writes a whole parameter (name of the local specification)."""
        place = places(megatron_name, self.shape)[0]
        size, offset = torch.Size((*place.sizes, *tensor.shape)), [*place.index] + [0] * tensor.dim()
        tensor = tensor.view(*[1] * len(place.index), *tensor.shape)
        whole = self._tensors.setdefault(place.name, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, []))
        if whole.properties.dtype != tensor.dtype:
            others = "layers" if self.shape.experts is None else "experts"
            raise CheckpointError(
                f"{megatron_name} is {tensor.dtype}, in other {others} {whole.properties.dtype}; choose one with --dtype"
            )
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage
        whole.chunks.append(ChunkStorageMetadata(torch.Size(offset), tensor.shape))
        start = self._file.tell()
        with _without_zip_checksums():
            torch.save(tensor, self._file)
        self._note(MetadataIndex(place.name, offset), start)

    def finish(self) -> None:
        """Writes the empty objects and the descriptions; everything is on disk afterwards."""
        empty = io.BytesIO()
        torch.save([None], empty)
        for name in object_names(self.shape):
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

    Args:
        shape: of the model.

    Raises:
        CheckpointError: ``directory`` is not such a checkpoint, or a file of it is missing or cut short; names it.
    """

    def __init__(self, directory: Path, shape: ModelShape) -> None:
        self.directory, self.shape = directory, shape
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

    def check(self, entries: tuple[Entry, ...]) -> None:
        """Compares with the model before anything is read.

        Raises:
            CheckpointError: the checkpoint does not hold exactly these parameters, in their shapes; names the parameter.
        """
        used = set()
        for entry in entries:
            place, stored = self._find(entry)
            size, wanted = tuple(stored.size), (*place.sizes, *self._shape(entry))
            padded = isinstance(entry, VocabularyEntry) and size[0] >= wanted[0] and size[1:] == wanted[1:]
            if size != wanted and not padded:
                raise CheckpointError(f"{self.directory}: {place.name} has shape {size}; config.json says {wanted}")
            used.add(place.name)
        if extra := sorted(set(self.names) - used):
            raise CheckpointError(f"{self.directory}: holds {', '.join(extra[:6])}, which the model of config.json has not")

    def __call__(self, entry: Entry) -> torch.Tensor:
        """The parameter of ``entry``, without padding rows.

        Raises:
            CheckpointError: it is absent, incomplete or damaged; names it.
        """
        place, stored = self._find(entry)
        shape = self._shape(entry)
        target = torch.empty(shape, dtype=stored.properties.dtype)
        offset = torch.Size([*place.index, *[0] * len(shape)])
        wanted = ChunkStorageMetadata(offset, torch.Size([*[1] * len(place.index), *shape]))
        items = create_read_items_for_chunk_list(place.name, stored, [wanted])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise CheckpointError(f"{self.directory}: {entry.megatron} is incomplete")
        try:
            self._reader.read_data(LoadPlan(items), _IntoOneTensor(target.view(wanted.sizes)))
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{self.directory}: {entry.megatron} cannot be read: {error}") from None
        return target

    def _find(self, entry: Entry) -> tuple[Place, TensorStorageMetadata]:
        """Where the parameter lies, and what the checkpoint says of that tensor."""
        candidates = places(entry.megatron, self.shape)
        for place in candidates:
            stored = self.metadata.state_dict_metadata.get(place.name)
            if isinstance(stored, TensorStorageMetadata):
                if any(at >= size for at, size in zip(place.index, stored.size, strict=False)):
                    break
                return place, stored
        raise CheckpointError(f"{self.directory}: parameter {entry.megatron} is missing (looked for {candidates[0].name})")

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
