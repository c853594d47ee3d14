"""Hugging Face model shape -> Megatron-Core configuration, layer specification and model chunks.

Every difference between the Megatron-Core versions and between the local and the Transformer Engine layers that concerns
building a model is in this file.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.model.experts import check_expert_layout, expert_settings, mark_experts
from pmpo_megatron.parallel.collectives import gather_objects
from pmpo_megatron.parallel.state import ParallelConfig, ParallelState


@functools.cache
def transformer_engine_available() -> bool:
    """Whether Transformer Engine's layers can be used here: a GPU to run on, installed, and importable.

    Raises:
        ConfigError: it is installed and does not import. Other layers in its place would be slower without a word, and
            different from those of ranks where it imports.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        problem = f"Transformer Engine is installed but does not import ({error}); mend it, or set model.layers=local"
        raise ConfigError("model.layers", problem) from None
    return True


def expects_fused(layers: str) -> bool:
    """Whether a run on GPUs with ``model.layers`` would have Transformer Engine's, as far as this machine can tell: where there
    is no GPU, as if it were installed where the run is."""
    return layers != "local" and (not torch.cuda.is_available() or transformer_engine_available())


def fused_layers(wanted: str, state: ParallelState) -> bool:
    """Whether the model is made of Transformer Engine's layers, as ``model.layers`` says; the same on all ranks. Collective.

    Raises:
        ConfigError: they are wanted and absent, or some ranks have them and others not; names these.
    """
    fused = wanted != "local" and transformer_engine_available()
    if wanted == "transformer_engine" and not fused:
        raise ConfigError("model.layers", "transformer_engine needs a GPU and the package transformer-engine; or set local")
    without = [rank for rank, theirs in enumerate(gather_objects(fused, state)) if not theirs]
    if 0 < len(without) < state.world_size:
        problem = (
            f"ranks {without[:8]} have no Transformer Engine and the others have; install it there, or set model.layers=local"
        )
        raise ConfigError("model.layers", problem)
    return fused


def check_layout(shape: ModelShape, config: ParallelConfig) -> None:
    """Raises ConfigError if the model cannot be split as asked; names the setting and what would be right."""
    divided = {"num_attention_heads": shape.num_attention_heads, "num_query_groups": shape.num_query_groups}
    if shape.experts is None or not all(shape.experts.sparse_layers):
        divided["ffn_hidden_size"] = shape.ffn_hidden_size
    for name, value in divided.items():
        if value % config.tensor:
            raise ConfigError("parallel.tensor", f"{config.tensor} must divide the model's {name} = {value}")
    check_expert_layout(shape.experts, config)
    stages = config.pipeline * (config.virtual_pipeline or 1)
    if shape.num_layers % stages:
        raise ConfigError(
            "parallel.pipeline",
            f"pipeline {config.pipeline} * virtual_pipeline {config.virtual_pipeline or 1} = {stages} must divide "
            f"the model's {shape.num_layers} layers",
        )


def transformer_config(shape: ModelShape, state: ParallelState, *, dtype: torch.dtype, recompute: str, fused: bool) -> Any:
    """Megatron's TransformerConfig for ``shape`` on this layout; ``fused``: of Transformer Engine's layers."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.transformer_config import TransformerConfig

    layout = state.config
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        # Initialisation must run although every weight is then loaded: it marks the parameters that are sharded,
        # and the gradient norm counts replicated ones by that mark. Drawing the random numbers is left out.
        use_cpu_initialization=state.device.type == "cpu",
        perform_initialization=True,
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        # Without it gradients are silently not reduced over the data-parallel ranks.
        finalize_model_grads_func=finalize_model_grads,
        calculate_per_token_loss=False,
        bias_dropout_fusion=fused,
        bias_activation_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_recompute_settings(recompute, shape),
        **(_pipeline_settings(state) | expert_settings(shape.experts, layout, fused=fused)),
    )


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _pipeline_settings(state: ParallelState) -> dict:
    if state.pp_size == 1:
        return {}
    # Micro-batches differ in length. Megatron allows that only with this dispatcher, also for models without experts.
    settings = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    if state.config.virtual_pipeline:
        # The default, batched point-to-point communication, gives silently wrong gradients at pipeline 2 on gloo.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings


def _recompute_settings(recompute: str, shape: ModelShape) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":  # attention never stores its scores here: the MLP's activations are the large ones
        modules = ["mlp"] if shape.experts is None else ["mlp", "moe"]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {}


def build_chunks(shape: ModelShape, config: Any, state: ParallelState, *, fused: bool) -> list[nn.Module]:
    """This rank's model chunks (one, or ``virtual_pipeline`` of them), with uninitialised weights, on the device."""
    return [_build_chunk(shape, config, state, chunk, fused) for chunk in range(state.num_chunks)]


@functools.cache
def _model_class() -> Any:
    """GPTModel whose last stage returns hidden states: `log_probs` makes log-probs of them in chunks, never whole logits."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    class HiddenStatesModel(GPTModel):  # megatron-core 0.16.1 and 0.19.2, gpt_model.py
        def _postprocess(self, hidden_states: torch.Tensor, *_ignored: Any, **_also_ignored: Any) -> torch.Tensor:
            return hidden_states

    return HiddenStatesModel


def _build_chunk(shape: ModelShape, config: Any, state: ParallelState, chunk: int, fused: bool) -> nn.Module:
    virtual = chunk if state.config.virtual_pipeline else None
    model = _model_class()(
        config,
        _layer_specification(config, virtual, fused),
        vocab_size=shape.padded_vocab_size(state.tp_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=state.holds_first_stage(chunk),
        post_process=state.holds_last_stage(chunk),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        vp_stage=virtual,
    )
    model.rotary_pos_emb.inv_freq = rotary_frequencies(shape).to(model.rotary_pos_emb.inv_freq.device)
    model = model.to(state.device)
    mark_experts(model)
    return model


def _layer_specification(config: Any, virtual: int | None, fused: bool) -> Any:
    """Of the layers of one chunk, or of one layer like all others."""
    from megatron.core.models.gpt import gpt_layer_specs

    if fused and config.num_moe_experts is None:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    if fused:
        return gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=virtual)
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from pmpo_megatron.model.layers import RMSNorm

    dense, sparse = _own_layer(config, None), None
    if config.num_moe_experts is not None:
        sparse = _own_layer(config, config.num_moe_experts)
    first = get_transformer_layer_offset(config, vp_stage=virtual)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=virtual))
    specs = [sparse if sparse is not None and config.moe_layer_freq[layer] else dense for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _own_layer(config: Any, num_experts: int | None) -> Any:
    """Specification of a layer on PyTorch alone, with an MLP or with ``num_experts``."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from pmpo_megatron.model.layers import CoreAttention, HostLengthsAttention, RMSNorm

    layer = get_gpt_layer_local_spec(num_experts=num_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention.module = HostLengthsAttention
    attention = parts.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if num_experts is not None:  # or checkpoints would have the norm of a layer with experts under another name than on GPUs
        kept = parts.sharded_state_dict_keys_map
        parts.sharded_state_dict_keys_map = {name: key for name, key in kept.items() if name != "pre_mlp_layernorm."}
    return layer


def rotary_frequencies(shape: ModelShape) -> torch.Tensor:
    """float32 [head_dim / 2]: inverse frequencies of the rotary embedding, scaled as the checkpoint says.

    Megatron's own llama3 scaling has the original length 8192 and the factors 1 and 4 built in; other values would be
    silently wrong. Formula: transformers, modeling_rope_utils.py, ``_compute_llama3_parameters``.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / scaling.factor, frequencies)
    medium = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(medium, blended, scaled)
