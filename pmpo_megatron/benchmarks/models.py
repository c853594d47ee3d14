"""The models that are evaluated: Hugging Face directories as they are, Megatron checkpoints exported on the fly."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpo_megatron.benchmarks.records import EXPORTED
from pmpo_megatron.convert import Options, megatron_to_hf
from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.errors import CheckpointError, ConfigError
from pmpo_megatron.hf.shape import read_config
from pmpo_megatron.monitor.progress import show_progress

NAME = re.compile(r"[\w.+-][\w.+ -]*")
WEIGHTS = ("*.safetensors", "*.bin", "*.distcp")
SAMPLE = 1 << 16  # bytes at the beginning, middle and end of a file that tell it from others


@dataclass(frozen=True)
class Model:
    """One model, by the name of its row and of its directory of results.

    ``side`` is the directory of its configuration and tokenizer: ``path`` itself if that is a Hugging Face directory.
    """

    name: str
    path: Path
    side: Path

    @property
    def is_hugging_face(self) -> bool:
        return (self.path / "config.json").is_file()

    @property
    def max_length(self) -> int | None:
        """Prompt and response at most, as the model's configuration says."""
        length = read_config(self.side).get("max_position_embeddings")
        if length is not None and (not isinstance(length, int) or length < 1):
            raise CheckpointError(f"{self.side / 'config.json'}: max_position_embeddings is {length!r:.80}, not a whole number")
        return length


def find_models(arguments: Sequence[str], hf: Path | None) -> list[Model]:
    """The models of the command line, each ``PATH`` or ``NAME=PATH``.

    Args:
        hf: configuration and tokenizer of Megatron checkpoints that have none beside them.

    Raises:
        ConfigError: a path is no directory, a name is no file name, or a name is there twice.
        CheckpointError: a checkpoint has no configuration and ``hf`` is None.
    """
    models = [_find(argument, hf) for argument in arguments]
    names = [model.name for model in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError("MODEL", f"{twice!r} is there twice; give other names with NAME=PATH")
    return models


def _find(argument: str, hf: Path | None) -> Model:
    named = "=" in argument and not Path(argument).is_dir()  # a directory's own name may contain the sign
    name, _, text = argument.partition("=") if named else (_default_name(Path(argument)), "", argument)
    path = Path(text)
    if not path.is_dir():
        raise ConfigError("MODEL", f"{path}: no such directory")
    if not NAME.fullmatch(name):
        raise ConfigError("MODEL", f"{name!r} cannot name a directory of results; use letters, digits and . + - _")
    if (path / "config.json").is_file():
        return Model(name, path, path)
    if hf is not None and not (hf / "config.json").is_file():
        raise ConfigError("--hf", f"{hf}: has no config.json")
    for side in (hf, path / "hf", path / "megatron" / "hf"):
        if side is not None and (side / "config.json").is_file():
            return Model(name, path, side)
    raise CheckpointError(
        f"{path}: has neither config.json nor hf/config.json; if it is a Megatron checkpoint, "
        "name the model's Hugging Face directory with --hf"
    )


def _default_name(path: Path) -> str:
    """``RUN-round-00000010`` for a run's checkpoint, else the directory's own name."""
    path = path.resolve()
    in_run = path.name.startswith("round-") and path.parent.name == "checkpoints"
    return f"{path.parents[1].name}-{path.name}" if in_run else path.name


def weights_digest(directory: Path) -> str:
    """Tells the weights in ``directory`` from others: from names, sizes and samples, so within a second at any size."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in WEIGHTS for path in directory.rglob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        with path.open("rb") as file:
            for position in (0, size // 2, max(0, size - SAMPLE)):
                file.seek(position)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


@contextmanager
def hugging_face_directory(model: Model, results: Path) -> Iterator[Path]:
    """The model as vLLM reads it. An export lies in ``results`` and is removed afterwards; one left by a kill is used again."""
    if model.is_hugging_face:
        yield model.path
        return
    exported = results / EXPORTED
    if not exported.is_dir():
        megatron_to_hf(model.path, exported, Options(follow=show_progress), hf=model.side)
    try:
        yield exported
    finally:
        shutil.rmtree(exported, ignore_errors=True)


def tokenizer_of(model: Model, template: str) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigError: it cannot be read, or has no chat template and ``template`` is ``chat``.
    """
    tokenizer = load_tokenizer(model.side, field="MODEL")
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("--template", f"chat: the tokenizer in {model.side} has no chat template; try qwen-math or plain")
    return tokenizer
