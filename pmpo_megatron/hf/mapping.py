"""The mapping of a whole model: from Megatron names to Hugging Face names and back, for loading, export and the bridge."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from pmpo_megatron.errors import MappingError
from pmpo_megatron.hf.entries import Entry, decoder_entries
from pmpo_megatron.hf.shape import ModelShape

# Transformer Engine fuses a norm into the linear layer that follows it, and names its weight after that layer.
TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.*)")
EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<number>\d+)\.(?P<weight>.*)")
GROUPED_EXPERT = re.compile(r"mlp\.experts\.(?P<weight>linear_fc[12]\.weight)(?P<number>\d+)")


def local_name(name: str) -> str:
    """A Megatron parameter's name in the local layer specification, whichever specification it comes from."""
    for fused, plain in TRANSFORMER_ENGINE_NAMES.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


def global_name(name: str, layer_offset: int, expert_offset: int = 0) -> str:
    """``name`` of a parameter of a pipeline stage's chunk with layer and expert counted over the whole model.

    Experts are numbered from ``expert_offset`` on this rank, and always named as in the local layer specification: Transformer
    Engine's grouped products have ``mlp.experts.linear_fc1.weight3`` for ``mlp.experts.local_experts.3.linear_fc1.weight``.
    """
    match = LAYER.fullmatch(name)
    if match is None:
        return name
    layer, rest = int(match["layer"]) + layer_offset, match["rest"]
    if expert := EXPERT.fullmatch(rest) or GROUPED_EXPERT.fullmatch(rest):
        rest = f"mlp.experts.local_experts.{int(expert['number']) + expert_offset}.{expert['weight']}"
    return f"decoder.layers.{layer}.{rest}"


@dataclass(frozen=True)
class WeightMapping:
    """All entries of a model, in the order of the forward pass."""

    shape: ModelShape

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(decoder_entries(self.shape))

    @cached_property
    def by_megatron(self) -> dict[str, Entry]:
        """Entries by Megatron name (local specification, global layer numbers)."""
        entries = {entry.megatron: entry for entry in self.entries}
        if self.shape.tied_embeddings:  # the last pipeline stage holds a copy of the embedding under this name
            entries["output_layer.weight"] = entries["embedding.word_embeddings.weight"]
        return entries

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model with its shape, in order."""
        return {name: shape for entry in self.entries for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)}

    def entry(self, megatron_name: str) -> Entry:
        """The entry of a Megatron parameter (either specification's name, global layer number).

        Raises:
            MappingError: there is none.
        """
        try:
            return self.by_megatron[local_name(megatron_name)]
        except KeyError:
            raise MappingError(f"{megatron_name}: {self.shape.architecture} has no such parameter") from None

    def check_names(self, names: Iterable[str], *, where: str) -> None:
        """Compares a checkpoint's tensor names with the model's.

        A tied output weight may be present, and so may rotary frequencies that old checkpoints carry.

        Raises:
            MappingError: names the tensors that are missing or extra.
        """
        present = {name for name in names if not name.endswith("rotary_emb.inv_freq")}
        if self.shape.tied_embeddings:
            present.discard("lm_head.weight")
        missing, extra = sorted(self.hf_shapes.keys() - present), sorted(present - self.hf_shapes.keys())
        if missing or extra:
            parts = [f"{kind}: {_some(which)}" for kind, which in (("missing", missing), ("not in the model", extra)) if which]
            raise MappingError(f"{where}: the tensors do not match {self.shape.architecture}; {'; '.join(parts)}")

    def load(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]],
        read: Callable[[str], torch.Tensor],
        piece: Callable[[Entry], tuple[int, int]],
    ) -> None:
        """Fills this rank's parameters from Hugging Face tensors, one parameter in memory at a time.

        Args:
            parameters: (Megatron name with global layer and expert numbers, shard to fill in place).
            read: gives a Hugging Face tensor by name.
            piece: (which, of how many) this rank holds of a parameter that tensor parallelism cuts.

        Raises:
            MappingError: a parameter or tensor has no counterpart, or another shape, or is not finite.
        """
        for name, parameter in parameters:
            entry = self.entry(name)
            shard = entry.shard(entry.merge([read(tensor) for tensor in entry.hf]), *piece(entry))
            if shard.shape != parameter.shape:
                raise MappingError(f"{name}: Megatron has shape {tuple(parameter.shape)}, the checkpoint {tuple(shard.shape)}")
            with torch.no_grad():
                parameter.copy_(shard)
                if parameter.numel() and not all(value.isfinite() for value in parameter.aminmax()):  # both are NaN if any is
                    raise MappingError(
                        f"{' and '.join(entry.hf)}: the weights hold NaN or inf, or what {parameter.dtype} cannot"
                    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
