"""Conversion between Hugging Face checkpoints and Megatron's distributed checkpoints, tensor by tensor, without a model."""

from pmpo_megatron.convert.conversion import Options, Summary, hf_to_megatron, megatron_to_hf

__all__ = ["Options", "Summary", "hf_to_megatron", "megatron_to_hf"]
