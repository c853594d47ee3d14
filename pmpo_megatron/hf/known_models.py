"""Shapes of published models, so that a run can be planned before its checkpoint is downloaded.

The values are those of the models' ``config.json``; `total_parameters` of each is tested against its published size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.shape import ModelShape, read_shape, shape_of

COLUMNS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16"}
QWEN2_MATH = QWEN2 | {"rope_theta": 1e4}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
QWEN2_MOE = QWEN2 | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "moe_intermediate_size": 768,
}
QWEN3_MOE_235B = QWEN3_MOE | {"moe_intermediate_size": 1536}
MIXTRAL = QWEN2 | {
    "architectures": ["MixtralForCausalLM"],
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
ROWS: dict[str, tuple[dict[str, Any], tuple]] = {
    "Qwen/Qwen2.5-0.5B": (QWEN2, (896, 4864, 24, 14, 2, 151936, True, 32768)),
    "Qwen/Qwen2.5-1.5B": (QWEN2, (1536, 8960, 28, 12, 2, 151936, True, 131072)),
    "Qwen/Qwen2.5-3B": (QWEN2, (2048, 11008, 36, 16, 2, 151936, True, 32768)),
    "Qwen/Qwen2.5-7B": (QWEN2, (3584, 18944, 28, 28, 4, 152064, False, 131072)),
    "Qwen/Qwen2.5-14B": (QWEN2, (5120, 13824, 48, 40, 8, 152064, False, 131072)),
    "Qwen/Qwen2.5-32B": (QWEN2, (5120, 27648, 64, 40, 8, 152064, False, 131072)),
    "Qwen/Qwen2.5-72B": (QWEN2, (8192, 29568, 80, 64, 8, 152064, False, 131072)),
    "Qwen/Qwen2.5-7B-Instruct": (QWEN2, (3584, 18944, 28, 28, 4, 152064, False, 32768)),
    "Qwen/Qwen2.5-14B-Instruct": (QWEN2, (5120, 13824, 48, 40, 8, 152064, False, 32768)),
    "Qwen/Qwen2.5-32B-Instruct": (QWEN2, (5120, 27648, 64, 40, 8, 152064, False, 32768)),
    "Qwen/Qwen2.5-72B-Instruct": (QWEN2, (8192, 29568, 80, 64, 8, 152064, False, 32768)),
    "Qwen/Qwen2.5-Coder-7B": (QWEN2, (3584, 18944, 28, 28, 4, 152064, False, 32768)),
    "Qwen/Qwen2.5-Math-1.5B": (QWEN2_MATH, (1536, 8960, 28, 12, 2, 151936, True, 4096)),
    "Qwen/Qwen2.5-Math-7B": (QWEN2_MATH, (3584, 18944, 28, 28, 4, 152064, False, 4096)),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (QWEN2_MATH, (1536, 8960, 28, 12, 2, 151936, False, 131072)),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (QWEN2_MATH, (3584, 18944, 28, 28, 4, 152064, False, 131072)),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": (QWEN2, (5120, 13824, 48, 40, 8, 152064, False, 131072)),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": (QWEN2, (5120, 27648, 64, 40, 8, 152064, False, 131072)),
    "Qwen/Qwen3-4B": (QWEN3, (2560, 9728, 36, 32, 8, 151936, True, 40960)),
    "Qwen/Qwen3-8B": (QWEN3, (4096, 12288, 36, 32, 8, 151936, False, 40960)),
    "Qwen/Qwen3-14B": (QWEN3, (5120, 17408, 40, 40, 8, 151936, False, 40960)),
    "Qwen/Qwen3-32B": (QWEN3, (5120, 25600, 64, 64, 8, 151936, False, 40960)),
    "Qwen/Qwen1.5-MoE-A2.7B": (QWEN2_MOE, (2048, 5632, 24, 16, 16, 151936, False, 8192)),
    "Qwen/Qwen3-30B-A3B": (QWEN3_MOE, (2048, 6144, 48, 32, 4, 151936, False, 40960)),
    "Qwen/Qwen3-30B-A3B-Base": (QWEN3_MOE, (2048, 6144, 48, 32, 4, 151936, False, 32768)),
    "Qwen/Qwen3-235B-A22B": (QWEN3_MOE_235B, (4096, 12288, 94, 64, 4, 151936, False, 40960)),
    "mistralai/Mixtral-8x7B-v0.1": (MIXTRAL, (4096, 14336, 32, 32, 8, 32000, False, 32768)),
    "meta-llama/Llama-3.1-8B": (LLAMA3, (4096, 14336, 32, 32, 8, 128256, False, 131072)),
    "meta-llama/Llama-3.1-8B-Instruct": (LLAMA3, (4096, 14336, 32, 32, 8, 128256, False, 131072)),
    "meta-llama/Llama-3.3-70B-Instruct": (LLAMA3, (8192, 28672, 80, 64, 8, 128256, False, 131072)),
}


def known_config(name: str) -> dict[str, Any]:
    """What ``config.json`` of the model of `ROWS` called ``name`` says of its shape."""
    family, values = ROWS[name]
    return family | dict(zip(COLUMNS, values, strict=True))


def known_shape(path: str) -> ModelShape | None:
    """The shape of the published model whose hub name, or the part of it after the slash, ``path`` ends with."""
    last = Path(path).name
    for name in ROWS:
        if path.rstrip("/") == name or last == name.split("/")[1]:
            return shape_of(known_config(name), where=name)
    return None


def model_shape(path: str) -> ModelShape:
    """The shape of the model in ``path``: of its ``config.json``, or of the known model that it is named after.

    Raises:
        ConfigError: there is no ``config.json``, and no known model has that name.
        MappingError: ``config.json`` asks for something that is not supported.
    """
    if (Path(path) / "config.json").exists():
        return read_shape(path)
    shape = known_shape(path)
    if shape is None:
        raise ConfigError(
            "model.path", f"{path} has no config.json and does not end with a model known here: {', '.join(sorted(ROWS))}"
        )
    return shape
