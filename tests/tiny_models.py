"""Tiny Hugging Face checkpoints with random weights, large enough that every term of the architecture matters."""

from __future__ import annotations

from pathlib import Path

COMMON = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,  # neither this nor the original length is what Megatron has built in
    "original_max_position_embeddings": 32,
}
EXPERTS = dict(tie_word_embeddings=False, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
KINDS = {
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=False)),
    "qwen2-tied": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(tie_word_embeddings=False, head_dim=16)),
    "qwen3-tied": ("Qwen3Config", dict(tie_word_embeddings=True, head_dim=16)),
    "llama": ("LlamaConfig", dict(tie_word_embeddings=False)),
    "llama3-tied": ("LlamaConfig", dict(tie_word_embeddings=True, rope_parameters=LLAMA3_SCALING)),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS | dict(head_dim=16, norm_topk_prob=True)),
    "qwen3-moe-mixed": ("Qwen3MoeConfig", EXPERTS | dict(head_dim=16, norm_topk_prob=False, mlp_only_layers=[0, 1])),
    "qwen2-moe": ("Qwen2MoeConfig", EXPERTS | dict(shared_expert_intermediate_size=40, norm_topk_prob=False)),
    "mixtral": ("MixtralConfig", dict(tie_word_embeddings=False, num_local_experts=8, num_experts_per_tok=2)),
}


def save_tiny_model(kind: str, directory: Path, *, vocab_size: int = 250, dtype: str = "float32", **changes) -> Path:
    """Writes a checkpoint of ``kind`` (see `KINDS`); 250 is not a multiple of 64, so Megatron pads the vocabulary."""
    import torch
    import transformers

    name, special = KINDS[kind]
    config = getattr(transformers, name)(**(COMMON | special | dict(vocab_size=vocab_size) | changes))
    generator = torch.Generator().manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 and parameter.mean() > 0.5 else 0.15 * noise)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory
