"""A distributed checkpoint's index, ``.metadata``: a pickle file, of which only descriptions of tensors are accepted."""

from __future__ import annotations

import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from pmpo_megatron.errors import CheckpointError

INDEX_FILE = ".metadata"
EXTRA_STATE = "_extra_state"  # of an object beside a layer's weights; empty without Transformer Engine's float8
# All that torch.distributed.checkpoint and Megatron-Core 0.16 and 0.19 write. By name, not by module: other classes of
# these modules start processes, and what a module imports would be reachable as an attribute of it.
DCP = "torch.distributed.checkpoint"
DATA_CLASSES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{DCP}.filesystem", "_StorageInfo"),
    (f"{DCP}.metadata", "BytesStorageMetadata"),
    (f"{DCP}.metadata", "ChunkStorageMetadata"),
    (f"{DCP}.metadata", "Metadata"),
    (f"{DCP}.metadata", "MetadataIndex"),
    (f"{DCP}.metadata", "StorageMeta"),
    (f"{DCP}.metadata", "TensorProperties"),
    (f"{DCP}.metadata", "TensorStorageMetadata"),
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{DCP}.planner", "SavePlan"),
    (f"{DCP}.planner", "TensorWriteData"),
    (f"{DCP}.planner", "WriteItem"),
    (f"{DCP}.planner", "WriteItemType"),
}
PATHS = {"Path", "PosixPath", "PurePath", "PurePosixPath"}  # of pathlib, or of a module of its package
MEGATRONS_PLANS = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}


class _Plan:
    """Stands for a plan that Megatron keeps in the index; not looked at."""


class IndexUnpickler(pickle.Unpickler):
    """Unpickles the index of a checkpoint and nothing else: a listed class, a path, or a type of numbers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in DATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in PATHS:
            return getattr(pathlib, name)
        if (module, name) in MEGATRONS_PLANS:
            return _Plan
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


def read_index(path: Path) -> Metadata:
    """The index in ``path``.

    Raises:
        CheckpointError: it is absent or damaged, or holds what is not a description of tensors.
    """
    try:
        with path.open("rb") as file:
            metadata = IndexUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {path.parent} is not a distributed checkpoint") from None
    except Exception as error:  # unpickling raises whatever the damaged bytes lead to
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}: is not the index of a distributed checkpoint")
    return metadata
