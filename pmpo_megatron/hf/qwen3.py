"""Qwen3 dense: RMSNorm on every query and key head, no biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pmpo_megatron.errors import MappingError
from pmpo_megatron.hf.entries import Entry, decoder_entries
from pmpo_megatron.hf.shape import ModelShape, llama_like

ARCHITECTURES = ("Qwen3ForCausalLM",)


def shape(config: Mapping[str, Any], architecture: str) -> ModelShape:
    if config.get("attention_bias"):
        raise MappingError("attention_bias is true; Qwen3 is supported without")
    return llama_like(config, architecture, qkv_bias=False, qk_norm=True)


def entries(shape: ModelShape) -> Iterator[Entry]:
    return decoder_entries(shape)
