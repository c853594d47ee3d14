"""The two conversions. Each checks everything that can be known before it writes, then moves one parameter at a time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from pmpo_megatron.checkpoint import files
from pmpo_megatron.checkpoint.index import INDEX_FILE
from pmpo_megatron.convert.hugging_face import (
    HfWeights,
    SafetensorsStream,
    SafetensorsWeights,
    byte_view,
    open_weights,
)
from pmpo_megatron.convert.megatron import MegatronReader, MegatronWriter
from pmpo_megatron.convert.output import output_directory
from pmpo_megatron.errors import CheckpointError, MappingError
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.safetensors import copy_side_files
from pmpo_megatron.hf.shape import read_config, read_shape

HF_PART = "hf"  # configuration and tokenizer beside Megatron's files
MEGATRON_PART = "megatron"  # of a run's checkpoint
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Follow = Callable[[str, int, Iterable], Iterable]


def silently(label: str, total: int, items: Iterable) -> Iterable:
    """The progress display that shows nothing. Others take the same: a label, how many items, and the items."""
    return items


@dataclass(frozen=True)
class Options:
    """What both conversions have in common.

    Attributes:
        dtype: a key of `DTYPES`; ``auto`` keeps every tensor's own.
        verify: read everything again before the result gets its name, and compare with what was read at first.
        force: replace a checkpoint that exists.
        follow: shows progress; see `silently`.
    """

    dtype: str = "auto"
    verify: bool = False
    force: bool = False
    follow: Follow = silently

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if DTYPES[self.dtype] is None else tensor.to(DTYPES[self.dtype])

    def stored_as(self, dtype: torch.dtype) -> torch.dtype:
        return DTYPES[self.dtype] or dtype


@dataclass(frozen=True)
class Summary:
    """What a conversion did. Bytes are the tensors'."""

    out: Path
    tensors: int
    num_bytes: int
    verified: bool


class Checksums:
    """CRC-32 of every tensor as it was read, by its Hugging Face name; of none unless ``wanted``."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._noted: dict[str, int] = {}

    def note(self, names: Iterable[str], tensors: list[torch.Tensor]) -> None:
        if self.wanted:
            self._noted.update((name, self._of(tensor)) for name, tensor in zip(names, tensors, strict=True))

    def compare(self, names: Iterable[str], tensors: list[torch.Tensor], where: Path) -> None:
        """Raises CheckpointError if one of ``tensors`` is not what was noted under its name."""
        for name, tensor in zip(names, tensors, strict=True):
            if self._of(tensor) != self._noted[name]:
                raise CheckpointError(f"{where}: {name} reads back different from what was written; the disk may be failing")

    @staticmethod
    def _of(tensor: torch.Tensor) -> int:
        return zlib.crc32(byte_view(tensor.contiguous()))


def hf_to_megatron(hf: Path, out: Path, options: Options | None = None, *, allow_pickle: bool = False) -> Summary:
    """Writes the Megatron checkpoint ``out`` from the Hugging Face directory ``hf``.

    Raises:
        MappingError: ``hf`` is not a whole checkpoint of a supported architecture; names the file or tensor.
        CheckpointError: ``out`` may not or cannot be written, or does not read back as written.
    """
    options = options or Options()
    shape = read_shape(hf)
    mapping = WeightMapping(shape)
    weights = open_weights(hf, allow_pickle=allow_pickle)
    _check_weights(hf, weights, mapping, options)
    dtypes = {name: options.stored_as(weights.info[name].dtype) for name in mapping.hf_shapes}
    num_bytes = sum(_num_bytes(whole, dtypes[name]) for name, whole in mapping.hf_shapes.items())
    checksums = Checksums(options.verify)
    with output_directory(out, force=options.force, inputs=[hf], num_bytes=num_bytes) as partial:
        with closing(MegatronWriter(partial, shape)) as writer:
            for entry in options.follow("converting", len(mapping.entries), mapping.entries):
                tensors = [options.cast(weights(name)) for name in entry.hf]
                checksums.note(entry.hf, tensors)
                writer.add(entry.megatron, entry.merge(tensors))
            del tensors
            writer.finish()
        (partial / HF_PART).mkdir()
        _copy_configuration(hf, partial / HF_PART, set(dtypes.values()))
        if options.verify:
            _verify_megatron(partial, mapping, checksums, options)
    return Summary(out, len(mapping.hf_shapes), num_bytes, options.verify)


def megatron_to_hf(
    checkpoint: Path, out: Path, options: Options | None = None, *, hf: Path | None = None, shard_bytes: int = 4 << 30
) -> Summary:
    """Writes the Hugging Face directory ``out`` from a Megatron checkpoint or a run's checkpoint, its model weights only.

    Args:
        hf: where configuration and tokenizer come from; None: from the checkpoint's own ``hf`` directory.
        shard_bytes: largest file.

    Raises:
        CheckpointError: the checkpoint is damaged, or lacks a parameter, which is named; ``out`` cannot be written.
        MappingError: ``config.json`` is absent or not supported.
    """
    options = options or Options()
    source = _megatron_directory(checkpoint)
    side = hf or _side_directory(checkpoint, source)
    shape = read_shape(side)
    mapping = WeightMapping(shape)
    if (checkpoint / files.MANIFEST).exists():
        _check_manifest(checkpoint, source, checksums=options.verify)
    reader = MegatronReader(source, shape)
    reader.check(mapping.entries)
    stored = ((options.stored_as(reader.dtype(entry)), entry) for entry in mapping.entries)
    plan = [(name, dtype, whole) for dtype, entry in stored for name, whole in zip(entry.hf, entry.hf_shapes, strict=True)]
    num_bytes = sum(_num_bytes(whole, dtype) for _, dtype, whole in plan)
    checksums = Checksums(options.verify)
    with output_directory(out, force=options.force, inputs=[checkpoint, side], num_bytes=num_bytes) as partial:
        with closing(SafetensorsStream(partial, plan, shard_bytes=shard_bytes)) as stream:
            for entry in options.follow("converting", len(mapping.entries), mapping.entries):
                tensors = [options.cast(tensor) for tensor in entry.split(reader(entry))]
                checksums.note(entry.hf, tensors)
                for name, tensor in zip(entry.hf, tensors, strict=True):
                    stream.add(name, tensor)
                del tensors, tensor
            stream.finish()
        _copy_configuration(side, partial, {dtype for _, dtype, _ in plan})
        if options.verify:
            _verify_hf(partial, mapping, checksums, options)
    return Summary(out, len(plan), num_bytes, options.verify)


def _verify_megatron(directory: Path, mapping: WeightMapping, checksums: Checksums, options: Options) -> None:
    reader = MegatronReader(directory, mapping.shape)
    reader.check(mapping.entries)
    for entry in options.follow("verifying", len(mapping.entries), mapping.entries):
        checksums.compare(entry.hf, entry.split(reader(entry)), directory)


def _verify_hf(directory: Path, mapping: WeightMapping, checksums: Checksums, options: Options) -> None:
    with closing(SafetensorsWeights(directory)) as written:
        for name in options.follow("verifying", len(mapping.hf_shapes), mapping.hf_shapes):
            checksums.compare((name,), [written(name)], directory)


def _check_weights(hf: Path, weights: HfWeights, mapping: WeightMapping, options: Options) -> None:
    """Names, shapes and types of everything, before anything is written."""
    mapping.check_names(weights.info, where=str(hf))
    for name, shape in mapping.hf_shapes.items():
        if weights.info[name].shape != shape:
            raise MappingError(
                f"{weights.info[name].path}: {name} has shape {weights.info[name].shape}; config.json says {shape}"
            )
    for entry in mapping.entries:
        dtypes = {name: options.stored_as(weights.info[name].dtype) for name in entry.hf}
        if len(set(dtypes.values())) > 1:
            listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
            raise MappingError(
                f"{hf}: {entry.megatron} is made of tensors of several types ({listed}); choose one with --dtype"
            )


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _copy_configuration(source: Path, target: Path, dtypes: set[torch.dtype]) -> None:
    """Copies configuration and tokenizer; config.json then names the type of the tensors, if they have one in common."""
    copy_side_files(source, target)
    config = read_config(target)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    if len(names) == 1 and any(config.get(key) not in names for key in keys):
        config |= dict.fromkeys(keys, *names)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _megatron_directory(checkpoint: Path) -> Path:
    """Where Megatron's files are: in ``checkpoint``, or below it if it is a run's."""
    for candidate in (checkpoint / MEGATRON_PART, checkpoint):
        if (candidate / INDEX_FILE).exists():
            return candidate
    hint = ""
    if rounds := files.list_checkpoints(checkpoint) or files.list_checkpoints(checkpoint / "checkpoints"):
        hint = f"; this seems to be a run: its newest checkpoint is {rounds[0]}"
    raise CheckpointError(f"{checkpoint}: is neither a Megatron checkpoint nor a run's{hint}")


def _side_directory(checkpoint: Path, source: Path) -> Path:
    for candidate in (checkpoint / HF_PART, source / HF_PART):
        if (candidate / "config.json").exists():
            return candidate
    raise CheckpointError(f"{checkpoint}: holds no {HF_PART}/config.json; name the model's Hugging Face directory with --hf")


def _check_manifest(checkpoint: Path, source: Path, *, checksums: bool) -> None:
    """A run's checkpoint knows its files: their sizes are compared always, their checksums if asked for."""
    manifest = files.read_manifest(checkpoint)
    prefix = f"{source.relative_to(checkpoint)}/" if source != checkpoint else ""
    mine = {name: entry for name, entry in manifest.items() if name.startswith(prefix)}
    damage = files.find_damage(checkpoint, mine) if checksums else _wrong_size(checkpoint, mine)
    if damage:
        raise CheckpointError(f"{checkpoint}: {damage}")


def _wrong_size(directory: Path, manifest: dict[str, list[int]]) -> str | None:
    for name, (size, _) in manifest.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None
