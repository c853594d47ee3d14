"""Single values of a ``config.json``, each within what any model has: a slip must not become a layout that never ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpo_megatron.errors import MappingError

LARGEST = {
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "original_max_position_embeddings": 1 << 31,
    "num_experts": 1 << 16,
    "num_local_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "moe_intermediate_size": 1 << 22,
    "shared_expert_intermediate_size": 1 << 22,
    "decoder_sparse_step": 4096,
}


def integer(values: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    """The whole number ``name``, from 1 to its entry in `LARGEST`.

    Raises:
        MappingError: it is something else.
        KeyError: it is missing and has no default.
    """
    value = values[name] if default is None else values.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST[name]:
        raise MappingError(f"{name} is {value!r:.80}; it must be a whole number from 1 to {LARGEST[name]}")
    return value


def positive(values: Mapping[str, Any], name: str) -> float:
    """The number ``name``, above 0.

    Raises:
        MappingError: it is something else.
        KeyError: it is missing.
    """
    value = values[name]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1e30:
        raise MappingError(f"{name} is {value!r:.80}; it must be a number above 0")
    return float(value)
