"""The index of a checkpoint is a pickle file: what describes tensors is read, and nothing else."""

import pickle

import pytest

from pmpo_megatron.checkpoint.index import DATA_CLASSES, read_index
from pmpo_megatron.errors import CheckpointError

# Each is a class or function that a pickle could call, of a module that an index does refer to, or of its package.
CRAFTED = [
    ("torch.distributed.checkpoint._async_process_executor", "_AsyncCheckpointProcess"),
    ("torch.distributed.checkpoint.filesystem", "FileSystem"),
    ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
    ("torch.distributed.checkpoint.planner", "SavePlanner"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch", "load"),
    ("pathlib", "os.system"),
    ("pathlib", "Path.unlink"),
    ("megatron.core.dist_checkpointing.strategies.torch", "TorchDistSaveShardedStrategy"),
    ("os", "system"),
]


@pytest.mark.parametrize(("module", "name"), CRAFTED)
def test_what_no_checkpoint_needs_is_refused(module, name, tmp_path):
    words = b"".join(pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in (module, name))
    (tmp_path / ".metadata").write_bytes(pickle.PROTO + b"\x04" + words + pickle.STACK_GLOBAL + pickle.EMPTY_TUPLE + b"R.")
    with pytest.raises(CheckpointError, match=f"damaged: it refers to {module}.{name}, which no checkpoint needs"):
        read_index(tmp_path / ".metadata")


def test_what_is_listed_is_data():
    """Every listed class of PyTorch is there, and is a record, an enumeration or a look-up of a layout."""
    import dataclasses
    import enum
    import importlib

    for module, name in DATA_CLASSES - {("collections", "OrderedDict"), ("torch", "Size")}:
        found = getattr(importlib.import_module(module), name)
        is_data = dataclasses.is_dataclass(found) or (isinstance(found, type) and issubclass(found, enum.Enum))
        assert is_data or name == "_get_layout", (module, name)
