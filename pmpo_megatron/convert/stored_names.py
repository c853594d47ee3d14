"""What Megatron's dist_checkpointing calls a model's parameters, and how it stacks layers and experts.

Of a model without experts a parameter of all layers is one tensor with the layer as its first dimension. Where layers may
differ, because some of them have experts, each has its own. The experts of a layer are one tensor with the expert as the
dimension before an expert's own. Names are those of Transformer Engine's specification, whichever specification the model has
(megatron-core 0.16 and 0.19, TransformerBlock.sharded_state_dict and SequentialMLP.sharded_state_dict).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pmpo_megatron.checkpoint.index import EXTRA_STATE
from pmpo_megatron.hf.mapping import EXPERT, LAYER, TRANSFORMER_ENGINE_NAMES
from pmpo_megatron.hf.shape import ModelShape

LAYERS = "decoder.layers."
ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")
MLP = ("linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: in the tensor ``name``, at ``index`` of its first dimensions, which have ``sizes``."""

    name: str
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def places(megatron_name: str, shape: ModelShape) -> list[Place]:
    """Where a parameter (name of the local specification) may lie: first where a model built here has it."""
    match = LAYER.fullmatch(megatron_name)
    if match is None:
        return [Place(megatron_name)]
    layer, rest = int(match["layer"]), match["rest"]
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    if (expert := EXPERT.fullmatch(rest)) and shape.experts is not None:
        rest = f"mlp.experts.experts.{expert['weight']}"
        index, sizes = (int(expert["number"]),), (shape.experts.num_experts,)
    fused = {plain: name for name, plain in TRANSFORMER_ENGINE_NAMES.items()}
    if shape.is_sparse(layer):
        fused.pop("pre_mlp_layernorm.weight")  # which the router reads, too, so that no linear layer contains it
    rest = fused.get(rest, rest)
    stacked = Place(f"{LAYERS}{rest}", (layer, *index), (shape.num_layers, *sizes))
    numbered = Place(f"{LAYERS}{layer}.{rest}", index, sizes)
    return [stacked, numbered] if shape.experts is None else [numbered, stacked]


def object_names(shape: ModelShape) -> Iterator[str]:
    """The keys of the empty objects beside the weights of linear layers, in a model of our own layers."""
    for layer in range(shape.num_layers):
        if shape.experts is None:
            for part in (*ATTENTION, *(f"mlp.{part}" for part in MLP)):
                yield f"{LAYERS}{part}.{EXTRA_STATE}/shard_{layer}_{shape.num_layers}"
            continue
        prefix, count = f"{LAYERS}{layer}.", shape.experts.num_experts
        single = [*ATTENTION]
        if shape.is_sparse(layer):
            for part in MLP:
                for number in range(count):
                    yield f"{prefix}mlp.experts.experts.{part}.{EXTRA_STATE}/shard_{number}_{count}"
            if shape.experts.shared_ffn_hidden_size is not None:
                single += [f"mlp.shared_experts.{part}" for part in MLP]
        else:
            single += [f"mlp.{part}" for part in MLP]
        yield from (f"{prefix}{part}.{EXTRA_STATE}/shard_0_1" for part in single)
