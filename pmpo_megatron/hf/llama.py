"""Llama 2, 3, 3.1, 3.2, 3.3 and DeepSeek-R1-Distill-Llama: no biases, llama3 rope scaling from 3.1 on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pmpo_megatron.errors import MappingError
from pmpo_megatron.hf.entries import Entry, decoder_entries
from pmpo_megatron.hf.shape import ModelShape, llama_like

ARCHITECTURES = ("LlamaForCausalLM",)


def shape(config: Mapping[str, Any], architecture: str) -> ModelShape:
    if config.get("attention_bias"):
        raise MappingError("attention_bias is true; Llama is supported without")
    return llama_like(config, architecture, qkv_bias=False, qk_norm=False)


def entries(shape: ModelShape) -> Iterator[Entry]:
    return decoder_entries(shape)
