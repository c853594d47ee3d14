"""The model's tokenizer: loaded, and applied to a prompt, with what goes wrong in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmpo_megatron.errors import ConfigError, DataError


def load_tokenizer(path: str | Path, *, field: str = "model.path") -> Any:
    """The tokenizer of the checkpoint directory ``path``, which ``field`` names; what ``tokenizer.json`` says, where it is.

    Transformers' AutoTokenizer takes some architectures' own kind in its place (5.x: of every ``qwen2``), which splits text in
    another way than a checkpoint's may.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = PreTrainedTokenizerFast if (Path(path) / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library raises whatever the files lead to
        raise ConfigError(field, f"{path}: its tokenizer cannot be read: {error}") from None


def encode(tokenizer: Any, text: str, special: bool, where: str) -> list[int]:
    """The tokens of a prompt: at least one of its own, beside those that the tokenizer puts around any text."""
    try:
        token_ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
        own = token_ids if len(token_ids) > 4 else tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises whatever its files lead to
        raise DataError(f"{where}: the tokenizer fails on the prompt {text[:80]!r}: {error!r}") from None
    if not own:
        raise DataError(f"{where}: the tokenizer gives no token for the prompt {text[:80]!r}: does it know these characters?")
    return token_ids
