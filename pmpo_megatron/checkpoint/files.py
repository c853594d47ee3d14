"""Directories that are complete or absent: a manifest of checksums, written last, and a rename."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

from pmpo_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
PREFIX = "round-"
PARTIAL = ".partial"
BLOCK = 16 << 20


def checkpoint_path(root: Path, round_index: int) -> Path:
    return root / f"{PREFIX}{round_index:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints in ``root``, newest first."""
    return sorted((path for path in root.glob(f"{PREFIX}*") if not path.name.endswith(PARTIAL)), reverse=True)


def checksum(path: Path) -> int:
    """CRC-32 of a file: finds damage, not malice."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def data_files(directory: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, in an order that all ranks agree on."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)


def describe_files(directory: Path, paths: Iterable[Path]) -> dict[str, list[int]]:
    """{relative name: [bytes, checksum]}, after every byte is on disk."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        found[str(path.relative_to(directory))] = [path.stat().st_size, checksum(path)]
    return found


def write_manifest(directory: Path, files: dict[str, list[int]]) -> None:
    path = directory / MANIFEST
    with path.open("w") as file:
        json.dump({"files": files}, file)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> dict[str, list[int]]:
    """{relative name: [bytes, checksum]}.

    Raises:
        CheckpointError: it is absent or damaged.
    """
    try:
        return json.loads((directory / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: absent or damaged: {error}") from None


def find_damage(directory: Path, files: dict[str, list[int]]) -> str | None:
    """What is wrong with ``files`` (a part of the manifest): the first file missing, cut short or changed."""
    for name, (size, expected) in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if checksum(path) != expected:
            return f"{name} is damaged (its checksum differs)"
    return None


def publish(partial: Path, final: Path) -> None:
    """Renames a finished directory into place and makes the rename durable."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old(root: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints, and what interrupted saves left."""
    for path in list_checkpoints(root)[keep:]:
        doomed = path.with_name(path.name + PARTIAL)
        path.rename(doomed)  # never half-removed under its final name
        shutil.rmtree(doomed, ignore_errors=True)
    for path in root.glob(f"*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
