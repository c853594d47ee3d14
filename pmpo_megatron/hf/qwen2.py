"""Qwen2, Qwen2.5, Qwen2.5-Math, DeepSeek-R1-Distill-Qwen: grouped-query attention with biases on q, k, v."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pmpo_megatron.hf.entries import Entry, decoder_entries
from pmpo_megatron.hf.shape import ModelShape, llama_like

ARCHITECTURES = ("Qwen2ForCausalLM",)


def shape(config: Mapping[str, Any], architecture: str) -> ModelShape:
    return llama_like(config, architecture, qkv_bias=True, qk_norm=False)


def entries(shape: ModelShape) -> Iterator[Entry]:
    return decoder_entries(shape)
