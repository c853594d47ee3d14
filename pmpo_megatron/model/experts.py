"""A mixture of experts in Megatron-Core: the settings that compute what the checkpoint means, and the layouts that can."""

from __future__ import annotations

from typing import Any

from torch import nn

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.experts import ExpertShape
from pmpo_megatron.parallel.state import ParallelConfig


def check_expert_layout(experts: ExpertShape | None, config: ParallelConfig) -> None:
    """Raises ConfigError if the experts cannot be split as asked; names the setting and what would be right."""
    if experts is None:
        if config.expert > 1 or config.expert_tensor is not None:
            raise ConfigError("parallel.expert", "is for models with experts, and this one has none; leave it out")
        return
    if experts.num_experts % config.expert:
        raise ConfigError("parallel.expert", f"{config.expert} must divide the model's {experts.num_experts} experts")
    if config.tensor > 1 and not config.sequence_parallel:
        raise ConfigError(
            "parallel.sequence_parallel",
            f"must be true for a model with experts and tensor {config.tensor}: else each rank would route every token",
        )
    if experts.ffn_hidden_size % config.expert_tensor_size:
        raise ConfigError(
            "parallel.expert_tensor",
            f"{config.expert_tensor_size} must divide the width of the model's experts, {experts.ffn_hidden_size}",
        )
    if (experts.shared_ffn_hidden_size or 0) % config.tensor:
        raise ConfigError(
            "parallel.tensor",
            f"{config.tensor} must divide the width of the model's shared expert, {experts.shared_ffn_hidden_size}",
        )


def expert_settings(experts: ExpertShape | None, layout: ParallelConfig, *, fused: bool) -> dict[str, Any]:
    """What Megatron's TransformerConfig has to say of ``experts``: no token is dropped, and the loss is the objective alone.

    The router is computed in float32 whatever the model's type, which transformers and vLLM do not do.
    """
    if experts is None:
        return {}
    _complete_router()
    return dict(
        num_moe_experts=experts.num_experts,
        moe_router_topk=experts.per_token,
        moe_ffn_hidden_size=experts.ffn_hidden_size,
        moe_shared_expert_intermediate_size=experts.shared_ffn_hidden_size,
        moe_shared_expert_gate=experts.shared_ffn_hidden_size is not None,
        moe_layer_freq=[int(sparse) for sparse in experts.sparse_layers],
        # The softmax of the chosen logits is the softmax of all, divided by the sum of the chosen ones.
        moe_router_pre_softmax=not experts.normalized,
        moe_router_score_function="softmax",
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=fused,
        moe_permute_fusion=fused,  # PyTorch's scatter_add_ would add a token's results up in another order every time on a GPU
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor_size,
    )


def mark_experts(model: nn.Module) -> None:
    """Says of every expert's weight that no other tensor-parallel rank has a copy of it, as Megatron's own layers do.

    Transformer Engine 2.20 does not (pytorch/module/grouped_linear.py, reset_parameters), and Megatron then counts the
    experts of the first tensor-parallel rank alone in the gradient's norm.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def _complete_router() -> None:
    """Megatron-Core 0.16.1 defines this name only where Transformer Engine is, and its router asks for it everywhere."""
    from megatron.core.transformer.moe import moe_utils

    vars(moe_utils).setdefault("te_general_gemm", None)
