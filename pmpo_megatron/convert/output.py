"""A directory that a conversion writes: complete under its name, or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pmpo_megatron.checkpoint.files import PARTIAL, publish
from pmpo_megatron.errors import CheckpointError
from pmpo_megatron.units import GIB

MARKS = ("config.json", "metadata.json", ".metadata")  # one of them is in every directory that a conversion may replace


@contextlib.contextmanager
def output_directory(out: Path, *, force: bool, inputs: Sequence[Path], num_bytes: int) -> Iterator[Path]:
    """Gives ``OUT.partial`` to write into; it becomes ``out`` if all goes well and is removed if not.

    A kill leaves at most ``OUT.partial``, which the next conversion to ``out`` removes.

    Args:
        force: an existing checkpoint in ``out`` is replaced, after the new one is complete.
        inputs: directories that are read; they are not written to.
        num_bytes: needed on the disk.

    Raises:
        CheckpointError: ``out`` exists and may not be replaced, overlaps an input, or the disk has too little room.
    """
    out = out.resolve()
    partial = out.with_name(out.name + PARTIAL)
    _check_free_to_write(out, force=force, inputs=inputs)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise CheckpointError(f"{out}: needs {num_bytes / GIB:.1f} GiB; the disk has {free / GIB:.1f} GiB free")
        yield partial
        _sync(partial)
        _put_in_place(partial, out)
    except OSError as error:
        raise CheckpointError(f"{out}: not written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, out: Path) -> None:
    """Renames; what was there gets out of the way first, because a kill during its removal would leave a half of it."""
    replaced = out.with_name(f"{out.name}.replaced{PARTIAL}")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    publish(partial, out)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_free_to_write(out: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    for path in (path.resolve() for path in inputs):
        if out == path or out in path.parents or path in out.parents:
            raise CheckpointError(f"{out}: overlaps {path}, which is read; choose another directory")
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out}: is a file")
    if not any(out.iterdir()):
        return
    if not force:
        raise CheckpointError(f"{out}: exists; replace it with --force, or choose another directory")
    if not any((out / mark).exists() for mark in MARKS):
        raise CheckpointError(f"{out}: is not a checkpoint, so --force does not replace it; remove it yourself")


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
