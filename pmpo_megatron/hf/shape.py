"""What a Hugging Face ``config.json`` says of a model, as one value, and the table of supported architectures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmpo_megatron.errors import MappingError
from pmpo_megatron.hf.config_values import integer, positive
from pmpo_megatron.hf.experts import ExpertFormat, ExpertShape, read_experts
from pmpo_megatron.units import round_up

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 (transformers, modeling_rope_utils._compute_llama3_parameters)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """Everything about a decoder that Megatron, the planner and the bridge need. Sizes in elements."""

    architecture: str  # Hugging Face class, e.g. Qwen2ForCausalLM
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    dtype: str  # of the checkpoint's tensors: float32, bfloat16, float16
    experts: ExpertShape | None = None

    def is_sparse(self, layer: int) -> bool:
        """Whether ``layer`` has a mixture of experts instead of one MLP."""
        return self.experts is not None and self.experts.sparse_layers[layer]

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding that Megatron allocates: a multiple of 64 and of the tensor-parallel size.

        The multiple of 64 makes it the same for every usual tensor-parallel size, so that a checkpoint moves between them.
        """
        multiple = 64 if 64 % tensor_parallel == 0 else 64 * tensor_parallel
        return round_up(self.vocab_size, multiple)


@dataclass(frozen=True)
class Architecture:
    """How a Hugging Face class differs from what all share: RMSNorm, rotary embedding, grouped-query attention, SwiGLU."""

    qkv_bias: bool = False  # biases on q, k and v
    qk_norm: bool = False  # RMSNorm on every query and key head
    experts: ExpertFormat | None = None
    refused: Mapping[str, str] = field(default_factory=dict)  # switches of config.json that must be off, and what is supported


REFUSED = {
    "quantization_config": "only weights that are not quantised are supported",
    "use_sliding_window": "only full attention is supported",
    "mlp_bias": "only MLPs without bias are supported",
}
NO_BIAS = {"attention_bias": "only attention without biases is supported"}
NO_WINDOW = {"sliding_window": "only full attention is supported"}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(refused=NO_BIAS),  # Llama 2, 3, 3.1, 3.2, 3.3, DeepSeek-R1-Distill-Llama
    "Qwen2ForCausalLM": Architecture(qkv_bias=True),  # Qwen2, Qwen2.5, Qwen2.5-Math, DeepSeek-R1-Distill-Qwen
    "Qwen3ForCausalLM": Architecture(qk_norm=True, refused=NO_BIAS),  # Qwen3 dense
    "Qwen2MoeForCausalLM": Architecture(  # Qwen1.5-MoE, Qwen2-57B-A14B
        qkv_bias=True, experts=ExpertFormat(shared_width="shared_expert_intermediate_size")
    ),
    "Qwen3MoeForCausalLM": Architecture(qk_norm=True, experts=ExpertFormat(), refused=NO_BIAS),  # Qwen3-30B-A3B, 235B-A22B
    "MixtralForCausalLM": Architecture(
        experts=ExpertFormat(
            width="intermediate_size",
            always_normalized=True,
            module="block_sparse_moe.",
            gate_up=("w1", "w3"),
            down="w2",
        ),
        refused=NO_WINDOW,
    ),
}


def read_config(directory: str | Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint directory.

    Raises:
        MappingError: it is absent or is not a JSON object.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MappingError(f"{path}: {error.strerror}; a Hugging Face checkpoint directory is needed") from None
    except (ValueError, RecursionError) as error:
        raise MappingError(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise MappingError(f"{path}: is not a JSON object")
    return config


def read_shape(directory: str | Path) -> ModelShape:
    """The shape of the model in ``directory``.

    Raises:
        MappingError: ``config.json`` is missing something, or names an architecture or a feature that is not supported.
    """
    return shape_of(read_config(directory), where=str(Path(directory) / "config.json"))


def shape_of(config: Mapping[str, Any], *, where: str = "config") -> ModelShape:
    """Does what `read_shape` does, from the values of ``config.json``; ``where`` stands in error messages."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise MappingError(f"{where}: architectures is {names!r:.80}, not a list of names")
    supported = [name for name in names if name in ARCHITECTURES]
    if not supported:
        raise MappingError(f"{where}: architectures {names} are not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    try:
        return _shape(config, supported[0])
    except KeyError as error:
        raise MappingError(f"{where}: {error} is missing") from None
    except (MappingError, TypeError, ValueError) as error:  # a list where a mapping belongs, and the like
        raise MappingError(f"{where}: {error}") from None


def _shape(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of the architecture ``name``.

    Raises:
        MappingError: the config asks for something that the model would not compute, or a value is out of range.
        KeyError: a value is missing.
    """
    architecture = ARCHITECTURES[name]
    for switch, supported in {**REFUSED, **architecture.refused}.items():
        if config.get(switch):
            raise MappingError(f"{switch} is {json.dumps(config[switch]):.80}; {supported}")
    if architecture.qkv_bias and config.get("qkv_bias") is False:
        raise MappingError("qkv_bias is false; only attention with biases is supported for this architecture")
    heads, groups, head_dim = _heads(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise MappingError(f"dtype is {dtype!r:.80}; supported: {', '.join(DTYPES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise MappingError(f"hidden_act is {config['hidden_act']!r}; only 'silu' is supported")
    theta, scaling = _rope(config)
    num_layers = integer(config, "num_hidden_layers")
    return ModelShape(
        architecture=name,
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        num_layers=num_layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        ffn_hidden_size=integer(config, "intermediate_size"),
        norm_epsilon=positive(config, "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        max_position_embeddings=integer(config, "max_position_embeddings"),
        dtype=dtype,
        experts=read_experts(config, architecture.experts, num_layers) if architecture.experts else None,
    )


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(query heads, key-value heads, elements of a head)."""
    heads = integer(config, "num_attention_heads")
    groups = integer(config, "num_key_value_heads", default=heads)
    if heads % groups:
        raise MappingError(f"num_key_value_heads {groups} must divide num_attention_heads {heads}")
    hidden = integer(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise MappingError(f"num_attention_heads {heads} must divide hidden_size {hidden}, because head_dim is missing")
    head_dim = integer(config, "head_dim", default=hidden // heads)
    if head_dim % 2:
        raise MappingError(f"head_dim is {head_dim}; rotary embedding needs an even one")
    return heads, groups, head_dim


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling): transformers 5 writes ``rope_parameters``, earlier ones ``rope_theta`` and ``rope_scaling``."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        raise MappingError(f"partial_rotary_factor is {share}; only rotary embedding of whole heads is supported")
    theta = positive({"rope_theta": parameters.get("rope_theta") or config.get("rope_theta") or 10000.0}, "rope_theta")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise MappingError(f"rope scaling {kind!r} is not supported; supported: default, llama3")
    return theta, RopeScaling(
        factor=positive(parameters, "factor"),
        low_freq_factor=positive(parameters, "low_freq_factor"),
        high_freq_factor=positive(parameters, "high_freq_factor"),
        original_max_position_embeddings=integer(parameters, "original_max_position_embeddings"),
    )
