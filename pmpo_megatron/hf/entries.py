"""One entry per Megatron parameter: the Hugging Face tensors it is made of, and how tensor parallelism cuts it.

Names are Megatron-Core's with the local layer specification and global layer numbers. Legend: all tensors are whole
(not sharded) unless called a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pmpo_megatron.errors import MappingError
from pmpo_megatron.hf.shape import ModelShape


@dataclass(frozen=True)
class Entry:
    """A Megatron parameter and its Hugging Face tensors.

    ``tensor_parallel_dim`` is the dimension that tensor parallelism cuts, None where every rank holds the whole. ``parts``
    of the parameter, stacked along dimension 0, are cut one by one, so that each rank holds a piece of every part. ``expert``
    is the number of the routed expert that it belongs to: such a parameter lies on one of the expert-parallel ranks, and is
    cut over the expert-tensor-parallel group. None: of all tokens.
    """

    megatron: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    tensor_parallel_dim: int | None = None
    parts: int = 1
    expert: int | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the whole Megatron parameter."""
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])

    def merge(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole Megatron parameter from the tensors named by ``hf``."""
        self._check_shapes(tensors)
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))

    def split(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """The tensors named by ``hf`` from the whole Megatron parameter; the inverse of `merge`."""
        return list(parameter.split([shape[0] for shape in self.hf_shapes])) if len(self.hf) > 1 else [parameter]

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Shape of what each of ``size`` tensor-parallel ranks holds."""
        shape, dim = self.full_shape, self.tensor_parallel_dim
        return shape if dim is None else (*shape[:dim], shape[dim] // size, *shape[dim + 1 :])

    def views(self, parameter: torch.Tensor, rank: int, size: int) -> list[torch.Tensor]:
        """What tensor-parallel ``rank`` of ``size`` holds of the whole parameter: one after another they are its shard."""
        if size == 1 or self.tensor_parallel_dim is None:
            return [parameter]
        dim = self.tensor_parallel_dim
        pieces = []
        for part in parameter.chunk(self.parts) if self.parts > 1 else [parameter]:
            if part.shape[dim] % size:
                raise MappingError(
                    f"{self.megatron}: {part.shape[dim]} rows or columns do not divide by tensor parallel {size}"
                )
            pieces.append(part.chunk(size, dim)[rank])
        return pieces

    def shard(self, parameter: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """What tensor-parallel ``rank`` of ``size`` holds of the whole parameter."""
        views = self.views(parameter, rank, size)
        return views[0] if len(views) == 1 else torch.cat(views)

    def _check_shapes(self, tensors: Sequence[torch.Tensor]) -> None:
        for name, shape, tensor in zip(self.hf, self.hf_shapes, tensors, strict=True):
            if tuple(tensor.shape) != shape:
                raise MappingError(f"{name}: has shape {tuple(tensor.shape)}; the config says {shape}")


@dataclass(frozen=True)
class VocabularyEntry(Entry):
    """Embedding or output layer: rows of padding after the vocabulary, which never leave Megatron."""

    padded_rows: int = 0

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (self.padded_rows, *self.hf_shapes[0][1:])

    def merge(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        self._check_shapes(tensors)
        [weight] = tensors
        missing = self.padded_rows - weight.shape[0]
        return torch.cat([weight, weight.new_zeros(missing, weight.shape[1])]) if missing else weight

    def split(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        return [parameter[: self.hf_shapes[0][0]]]


@dataclass(frozen=True)
class QKVEntry(Entry):
    """Megatron's fused projection: for every key-value head its query heads, then k, then v; biases likewise."""

    groups: int = 1
    head_dim: int = 1

    def merge(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        self._check_shapes(tensors)
        rest = tensors[0].shape[1:]
        grouped = [tensor.reshape(self.groups, -1, *rest) for tensor in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)

    def split(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        rest = parameter.shape[1:]
        grouped = parameter.reshape(self.groups, -1, *rest)
        sizes = [grouped.shape[1] - 2 * self.head_dim, self.head_dim, self.head_dim]
        return [part.reshape(-1, *rest) for part in grouped.split(sizes, dim=1)]


def decoder_entries(shape: ModelShape) -> Iterator[Entry]:
    """Entries of every architecture in `shape.ARCHITECTURES`, in the order of the forward pass."""
    hidden, padded = shape.hidden_size, shape.padded_vocab_size(1)
    table = ((shape.vocab_size, hidden),)
    yield VocabularyEntry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), table, 0, padded_rows=padded)
    for layer in range(shape.num_layers):
        names = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        yield from _attention_entries(shape, *names)
        yield Entry(f"{names[0]}pre_mlp_layernorm.weight", (f"{names[1]}post_attention_layernorm.weight",), ((hidden,),))
        if shape.is_sparse(layer):
            yield from _mixture_entries(shape, *names)
        else:
            yield from _mlp_entries(f"{names[0]}mlp.", f"{names[1]}mlp.", hidden, shape.ffn_hidden_size)
    yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),))
    if not shape.tied_embeddings:
        yield VocabularyEntry("output_layer.weight", ("lm_head.weight",), table, 0, padded_rows=padded)


def _attention_entries(shape: ModelShape, megatron: str, hf: str) -> Iterator[Entry]:
    hidden, head = shape.hidden_size, shape.head_dim
    queries, keys = shape.num_attention_heads * head, shape.num_query_groups * head
    names = tuple(f"{hf}self_attn.{x}_proj." for x in "qkv")
    grouped = dict(tensor_parallel_dim=0, groups=shape.num_query_groups, head_dim=head)
    yield Entry(f"{megatron}input_layernorm.weight", (f"{hf}input_layernorm.weight",), ((hidden,),))
    qkv_shapes = ((queries, hidden), (keys, hidden), (keys, hidden))
    yield QKVEntry(f"{megatron}self_attention.linear_qkv.weight", tuple(f"{n}weight" for n in names), qkv_shapes, **grouped)
    if shape.qkv_bias:
        bias_shapes = ((queries,), (keys,), (keys,))
        yield QKVEntry(f"{megatron}self_attention.linear_qkv.bias", tuple(f"{n}bias" for n in names), bias_shapes, **grouped)
    if shape.qk_norm:
        for x in "qk":
            yield Entry(f"{megatron}self_attention.{x}_layernorm.weight", (f"{hf}self_attn.{x}_norm.weight",), ((head,),))
    yield Entry(f"{megatron}self_attention.linear_proj.weight", (f"{hf}self_attn.o_proj.weight",), ((hidden, queries),), 1)


def _mixture_entries(shape: ModelShape, megatron: str, hf: str) -> Iterator[Entry]:
    """Router, routed experts, and the shared expert with its gate, which Megatron names and keeps differently."""
    hidden, experts = shape.hidden_size, shape.experts
    assert experts is not None
    written = experts.format
    table = f"{hf}{written.module}"
    yield Entry(f"{megatron}mlp.router.weight", (f"{table}gate.weight",), ((experts.num_experts, hidden),))
    for number in range(experts.num_experts):
        names = f"{megatron}mlp.experts.local_experts.{number}.", f"{table}experts.{number}."
        yield from _mlp_entries(
            *names, hidden, experts.ffn_hidden_size, expert=number, gate_up=written.gate_up, down=written.down
        )
    if experts.shared_ffn_hidden_size is not None:
        gate, ours = f"{table}shared_expert_gate.weight", f"{megatron}mlp.shared_experts."
        yield Entry(f"{ours}gate_weight", (gate,), ((1, hidden),))
        yield from _mlp_entries(ours, f"{table}shared_expert.", hidden, experts.shared_ffn_hidden_size)


def _mlp_entries(
    megatron: str,
    hf: str,
    hidden: int,
    ffn: int,
    *,
    expert: int | None = None,
    gate_up: tuple[str, str] = ("gate_proj", "up_proj"),
    down: str = "down_proj",
) -> Iterator[Entry]:
    names = tuple(f"{hf}{x}.weight" for x in gate_up)
    yield Entry(f"{megatron}linear_fc1.weight", names, ((ffn, hidden), (ffn, hidden)), 0, parts=2, expert=expert)
    yield Entry(f"{megatron}linear_fc2.weight", (f"{hf}{down}.weight",), ((hidden, ffn),), 1, expert=expert)
