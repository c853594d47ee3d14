"""Files and directories that are complete or absent: written under another name, checksummed where it matters, renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pmpo_megatron.checkpoint.config import CheckpointConfig
from pmpo_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
PARTIAL = ".partial"
NAME = re.compile(r"round-(\d{8})")  # everything else in the directory is somebody else's: never read, never removed
BLOCK = 16 << 20


def checkpoint_path(root: Path, round_index: int) -> Path:
    return root / f"round-{round_index:08d}"


def round_of(path: Path) -> int:
    """The number in the name of a checkpoint."""
    return int(path.name.removeprefix("round-"))


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints in ``root``, newest first; none where ``root`` is not there."""
    return _directories(root, "")


def _directories(root: Path, suffix: str) -> list[Path]:
    """Real directories in ``root`` with the name of a checkpoint and ``suffix``, newest first."""
    try:
        with os.scandir(root) as entries:
            names = [
                entry.name
                for entry in entries
                if entry.name.endswith(suffix)
                and NAME.fullmatch(entry.name.removesuffix(suffix) if suffix else entry.name)
                and entry.is_dir(follow_symlinks=False)
            ]
    except FileNotFoundError:
        return []
    return [root / name for name in sorted(names, reverse=True)]


def free_bytes(path: Path) -> int:
    """Bytes that can be written at ``path``, which need not be there yet."""
    present = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(present).free


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
    described = {}
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        described[str(path.relative_to(directory))] = [path.stat().st_size, checksum(path)]
    return described


def write_manifest(directory: Path, files: dict[str, list[int]]) -> None:
    path = directory / MANIFEST
    with path.open("w") as file:
        json.dump({"files": files}, file)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> dict[str, list[int]]:
    """{relative name: [bytes, checksum]}, of at least one file, all of them inside ``directory``.

    Raises:
        CheckpointError: it is absent or damaged.
    """
    path = directory / MANIFEST
    content = _read_json(path)
    listed = content.get("files") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: damaged: it names no files")
    for name, entry in listed.items():
        if not (isinstance(entry, list) and len(entry) == 2 and all(type(number) is int for number in entry)):
            raise CheckpointError(f"{path}: damaged: {name!r} has no size and checksum")
        if "\0" in name or PurePosixPath(name).is_absolute() or not set(name.split("/")).isdisjoint({"", ".", ".."}):
            raise CheckpointError(f"{path}: damaged: {name!r} is not a file of the checkpoint")
    return listed


def read_progress(directory: Path) -> dict[str, Any]:
    """What the run wrote into the checkpoint about itself.

    Raises:
        CheckpointError: it is absent or damaged.
    """
    path = directory / PROGRESS
    progress = _read_json(path)
    if not isinstance(progress, dict):
        raise CheckpointError(f"{path}: damaged: a {type(progress).__name__} instead of named values")
    return progress


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: absent or damaged: {error}") from None


def find_damage(directory: Path, files: dict[str, list[int]]) -> str | None:
    """What is wrong with ``files`` (a part of the manifest): the first file missing, cut short or changed."""
    for name, (size, expected) in files.items():
        path = directory / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if checksum(path) != expected:
                return f"{name} is damaged (its checksum differs)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def replace_text(path: Path, text: str) -> None:
    """Writes ``text`` as the file ``path``, in one step: whoever reads it, or ends this process, sees the old or the new."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def set_aside(directory: Path, paths: Iterable[Path]) -> Path:
    """Moves ``paths`` into ``directory``/earlier/TIME, for a run that starts anew in its directory; returns that."""
    attic = directory / "earlier" / time.strftime("%Y%m%d-%H%M%S")
    while attic.exists():
        attic = attic.with_name(attic.name + "+")
    attic.mkdir(parents=True)
    for path in paths:
        path.rename(attic / path.name)
    return attic


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


def choose_kept(rounds: Iterable[int], config: CheckpointConfig, accuracy: Mapping[int, float]) -> set[int]:
    """Those of ``rounds`` whose checkpoints stay: the newest, every n-th, and the best of those that were evaluated."""
    ordered = sorted(rounds, reverse=True)
    kept = set(ordered[: config.keep])
    if config.keep_every is not None:
        kept |= {number for number in ordered if number % config.keep_every == 0}
    evaluated = [number for number in ordered if number in accuracy]
    return kept | set(sorted(evaluated, key=lambda number: -accuracy[number])[: config.keep_best])


def remove_old(
    root: Path, config: CheckpointConfig, *, accuracy: Mapping[int, float] | None = None, damaged: Collection[Path] = ()
) -> None:
    """Removes the checkpoints that ``config`` does not keep, and what interrupted saves left.

    Args:
        accuracy: on held-out problems, by round.
        damaged: those that are, which are not kept and count for nothing.
    """
    checkpoints = {round_of(path): path for path in list_checkpoints(root)}
    kept = choose_kept((number for number, path in checkpoints.items() if path not in damaged), config, accuracy or {})
    for number, path in checkpoints.items():
        if number not in kept:
            doomed = path.with_name(path.name + PARTIAL)
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)  # never half-removed under its final name
    for path in _directories(root, PARTIAL):
        shutil.rmtree(path, ignore_errors=True)
