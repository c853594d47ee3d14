"""What a Hugging Face ``config.json`` says of a mixture of experts, and what a checkpoint calls its tensors.

Supported is what Qwen's and Mistral's mixtures compute: a linear router without bias whose logits become weights by a softmax,
the ``num_experts_per_tok`` largest of them, no limit on a token's or an expert's place, and at most one shared expert with a
gate of its own. Everything else that a config can ask for is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpo_megatron.errors import MappingError
from pmpo_megatron.hf.config_values import integer

# Fields of other mixtures (DeepSeek, GLM, Kimi and their kind), which the model built here would not compute.
REFUSED = {
    "q_lora_rank": "only attention without latent projections (no MLA) is supported",
    "kv_lora_rank": "only attention without latent projections (no MLA) is supported",
    "n_group": "only routing without groups of experts is supported",
    "topk_group": "only routing without groups of experts is supported",
    "topk_method": "only the largest router weights of all experts are supported",
    "use_expert_bias": "only routers without a bias for each expert are supported",
    "router_bias": "only routers without bias are supported",
    "router_jitter_noise": "only routing without noise is supported",
    "first_k_dense_replace": "layers without experts are named by mlp_only_layers and decoder_sparse_step",
    "n_shared_experts": "one shared expert is supported, of shared_expert_intermediate_size",
}
FIXED = {"scoring_func": "softmax", "routed_scaling_factor": 1.0}  # the only value that is supported, where there is one


@dataclass(frozen=True)
class ExpertFormat:
    """How an architecture writes a mixture of experts: fields of its config, and tensors below ``model.layers.N``."""

    width: str = "moe_intermediate_size"  # the field with an expert's width
    shared_width: str | None = None  # the field with the shared expert's; None: there is none
    always_normalized: bool = False  # as with norm_topk_prob, which the config then does not have
    module: str = "mlp."  # holds gate.weight and experts.N
    gate_up: tuple[str, str] = ("gate_proj", "up_proj")
    down: str = "down_proj"


@dataclass(frozen=True)
class ExpertShape:
    """The mixture of experts of a model, the same in all layers that have one. Sizes in elements."""

    num_experts: int
    per_token: int
    ffn_hidden_size: int  # of one expert
    shared_ffn_hidden_size: int | None  # of the expert that takes every token; None: there is none
    normalized: bool  # whether the weights of a token's experts are divided by their sum
    sparse_layers: tuple[bool, ...]  # of every layer of the model: experts, or one MLP
    format: ExpertFormat

    @property
    def num_sparse_layers(self) -> int:
        return sum(self.sparse_layers)


def read_experts(config: Mapping[str, Any], written: ExpertFormat, num_layers: int) -> ExpertShape:
    """The mixture of experts of ``config.json``, for an architecture that writes it as ``written`` says.

    Raises:
        MappingError: the config asks for something that the model would not compute, or a value is out of range.
        KeyError: a value is missing.
    """
    for switch, supported in REFUSED.items():
        if config.get(switch):
            raise MappingError(f"{switch} is {json.dumps(config[switch]):.80}; {supported}")
    for name, only in FIXED.items():
        if config.get(name, only) not in (only, None):
            raise MappingError(f"{name} is {json.dumps(config[name]):.80}; only {json.dumps(only)} is supported")
    # transformers 5 writes num_local_experts, earlier ones num_experts, for the same models.
    count = integer(config, "num_local_experts" if "num_local_experts" in config else "num_experts")
    per_token = integer(config, "num_experts_per_tok")
    normalized = written.always_normalized or bool(config.get("norm_topk_prob", False))
    if per_token > count:
        raise MappingError(f"num_experts_per_tok is {per_token}, and there are {count} experts")
    if per_token == 1 and normalized:
        raise MappingError("num_experts_per_tok is 1 with norm_topk_prob: every weight would be 1, and no router could learn")
    return ExpertShape(
        num_experts=count,
        per_token=per_token,
        ffn_hidden_size=integer(config, written.width),
        shared_ffn_hidden_size=integer(config, written.shared_width) if written.shared_width else None,
        normalized=normalized,
        sparse_layers=_sparse_layers(config, num_layers),
        format=written,
    )


def _sparse_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """As transformers, modeling_qwen3_moe.py, ``Qwen3MoeDecoderLayer``: every decoder_sparse_step-th layer but those named."""
    step, dense = integer(config, "decoder_sparse_step", default=1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < num_layers for layer in dense):
        raise MappingError(f"mlp_only_layers is {dense!r:.80}; it must be a list of layers from 0 to {num_layers - 1}")
    sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    if not any(sparse):
        raise MappingError(f"mlp_only_layers and decoder_sparse_step {step} leave no layer with experts")
    return sparse
