"""The model's tokenizer: loaded, and applied to a prompt, with what goes wrong in one line."""

from __future__ import annotations

from typing import Any

from pmpo_megatron.errors import ConfigError, DataError


def load_tokenizer(path: str) -> Any:
    """The tokenizer of the checkpoint directory ``path``.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library raises whatever the files lead to
        raise ConfigError("model.path", f"{path}: its tokenizer cannot be read: {error}") from None


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
