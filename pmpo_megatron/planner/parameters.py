"""Which parameters a rank holds and what Megatron allocates for them: exact, by Megatron's own rules.

Rules (megatron-core 0.16.1 distributed/param_and_grad_buffer.py, 0.19.2 optimizer/param_layout.py): parameters lie in one
buffer for each model chunk, in reverse order of the module. With the distributed optimizer each starts at a multiple of 64
elements, a bucket ends at a multiple of lcm(data-parallel size, 128), and a shared embedding has a bucket of its own; each
data-parallel rank (context-parallel ranks count as such) owns an equal contiguous part of every bucket. Experts that are spread
over expert-parallel ranks lie in a second buffer, which the ranks with copies of the same experts share in the same way.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import partial

from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.model.architecture import check_layout
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.units import ITEM_SIZE, round_up


@dataclass(frozen=True)
class Parameter:
    """One tensor of a rank: name inside its model chunk and number of elements of this rank's shard."""

    name: str
    numel: int
    shared_embedding: bool = False
    spread: bool = False  # an expert's, where expert-parallel ranks hold different ones


def chunk_parameters(shape: ModelShape, parallel: ParallelConfig, *, stage: int, chunk: int = 0) -> list[Parameter]:
    """The parameters of model chunk ``chunk`` on pipeline stage ``stage``, in the order of Megatron's module."""
    check_layout(shape, parallel)
    chunks = parallel.virtual_pipeline or 1
    first = stage == 0 and chunk == 0
    last = stage == parallel.pipeline - 1 and chunk == chunks - 1
    vocabulary = shape.padded_vocab_size(parallel.tensor) // parallel.tensor * shape.hidden_size
    duplicated = shape.tied_embeddings and parallel.pipeline > 1  # the last stage has a copy of the embedding
    parameters = [Parameter("embedding.word_embeddings.weight", vocabulary, duplicated)] if first else []
    count = shape.num_layers // (parallel.pipeline * chunks)
    before = (chunk * parallel.pipeline + stage) * count
    for layer in range(count):
        parameters += layer_parameters(shape, parallel, before + layer, f"decoder.layers.{layer}.")
    if last:
        parameters.append(Parameter("decoder.final_layernorm.weight", shape.hidden_size))
        if duplicated or not shape.tied_embeddings:
            parameters.append(Parameter("output_layer.weight", vocabulary, duplicated))
    return parameters


def layer_parameters(shape: ModelShape, parallel: ParallelConfig, layer: int, prefix: str = "") -> list[Parameter]:
    """The parameters of transformer layer ``layer`` on one rank."""
    tensor, hidden = parallel.tensor, shape.hidden_size
    queries = shape.num_attention_heads * shape.head_dim
    qkv = queries + 2 * shape.num_query_groups * shape.head_dim
    sizes = {"input_layernorm.weight": hidden, "self_attention.linear_proj.weight": queries * hidden // tensor}
    sizes["self_attention.linear_qkv.weight"] = qkv * hidden // tensor
    if shape.qkv_bias:
        sizes["self_attention.linear_qkv.bias"] = qkv // tensor
    if shape.qk_norm:
        sizes |= {"self_attention.q_layernorm.weight": shape.head_dim, "self_attention.k_layernorm.weight": shape.head_dim}
    sizes["pre_mlp_layernorm.weight"] = hidden
    if shape.is_sparse(layer):
        return [Parameter(prefix + name, numel) for name, numel in sizes.items()] + _mixture_parameters(shape, parallel, prefix)
    sizes["mlp.linear_fc1.weight"] = 2 * shape.ffn_hidden_size * hidden // tensor
    sizes["mlp.linear_fc2.weight"] = shape.ffn_hidden_size * hidden // tensor
    return [Parameter(prefix + name, numel) for name, numel in sizes.items()]


def _mixture_parameters(shape: ModelShape, parallel: ParallelConfig, prefix: str) -> list[Parameter]:
    """Router, this rank's experts, and the shared expert of a layer."""
    hidden, experts = shape.hidden_size, shape.experts
    assert experts is not None
    parameters = [Parameter(f"{prefix}mlp.router.weight", experts.num_experts * hidden)]
    width = experts.ffn_hidden_size * hidden // parallel.expert_tensor_size
    for number in range(experts.num_experts // parallel.expert):
        for name, numel in (("linear_fc1", 2 * width), ("linear_fc2", width)):
            full_name = f"{prefix}mlp.experts.local_experts.{number}.{name}.weight"
            parameters.append(Parameter(full_name, numel, spread=parallel.expert > 1))
    if experts.shared_ffn_hidden_size is not None:
        shared = experts.shared_ffn_hidden_size * hidden // parallel.tensor
        sizes = {"gate_weight": hidden, "linear_fc1.weight": 2 * shared, "linear_fc2.weight": shared}
        parameters += [Parameter(f"{prefix}mlp.shared_experts.{name}", numel) for name, numel in sizes.items()]
    return parameters


def spread_parameters(shape: ModelShape, parallel: ParallelConfig) -> float:
    """Elements of experts that a rank shares with the ranks of the same experts only; a mean over pipeline stages."""
    if shape.experts is None or parallel.expert == 1:
        return 0.0
    expert = 3 * shape.experts.ffn_hidden_size * shape.hidden_size / parallel.expert_tensor_size
    return shape.experts.num_sparse_layers / parallel.pipeline * shape.experts.num_experts / parallel.expert * expert


@functools.lru_cache(maxsize=256)
def total_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model as in its Hugging Face checkpoint: no padding, tied embeddings once."""
    vocabulary = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    whole = ParallelConfig()
    layers = sum(p.numel for layer in range(shape.num_layers) for p in layer_parameters(shape, whole, layer))
    return vocabulary + shape.hidden_size + layers


def active_parameters(shape: ModelShape) -> int:
    """Of `total_parameters` those that one token uses: of a layer's routed experts as many as it is sent to."""
    if shape.experts is None:
        return total_parameters(shape)
    unused = shape.experts.num_experts - shape.experts.per_token
    expert = 3 * shape.experts.ffn_hidden_size * shape.hidden_size
    return total_parameters(shape) - shape.experts.num_sparse_layers * unused * expert


@dataclass(frozen=True)
class Buffer:
    """Megatron's parameter and gradient buffer of one model chunk: ranges in elements."""

    numel: int
    ranges: tuple[tuple[int, int], ...]  # of each parameter
    buckets: tuple[tuple[int, int], ...]

    def most_owned(self, size: int) -> int:
        """`owned` of the data-parallel rank that owns most."""
        most, share = 0, self.numel // size
        for rank in range(size):
            most = max(most, self.owned(rank, size))
            if most == share:  # its parts hold no padding
                break
        return most

    def owned(self, rank: int, size: int) -> int:
        """Elements of parameters, without padding, in data-parallel ``rank``'s parts of the buckets."""
        total = 0
        for start, end in self.buckets:
            share = (end - start) // size
            low, high = start + rank * share, start + (rank + 1) * share
            total += sum(max(0, min(high, b) - max(low, a)) for a, b in self.ranges)
        return total


def lay_out(parameters: list[Parameter], *, replicas: int, distributed: bool, bucket_size: int | None = None) -> Buffer:
    """Where each parameter lies in its chunk's buffer. ``replicas`` is data-parallel times context-parallel size.

    ``bucket_size``: elements after which a bucket ends; None: there is one, but for shared embeddings.
    """
    if not distributed:
        ends = [0]
        for parameter in reversed(parameters):
            ends.append(ends[-1] + parameter.numel)
        return Buffer(ends[-1], tuple(zip(ends[:-1], ends[1:], strict=True)), ((0, ends[-1]),))
    position = bucket = 0
    ranges, buckets = [], []

    def close_bucket(end: int) -> int:
        nonlocal bucket
        buckets.append((bucket, round_up(end, math.lcm(replicas, 128))))
        bucket = buckets[-1][1]
        return bucket

    for parameter in reversed(parameters):
        start = round_up(position, 64)
        if parameter.shared_embedding and position > bucket:
            start = close_bucket(start)
        position = start + parameter.numel
        ranges.append((start, position))
        if parameter.shared_embedding or (bucket_size is not None and position - bucket >= bucket_size):
            position = close_bucket(position)
    if position > bucket:
        close_bucket(position)
    return Buffer(bucket, tuple(ranges), tuple(buckets))


@functools.lru_cache(maxsize=256)
def chunk_buffers(
    shape: ModelShape, parallel: ParallelConfig, *, stage: int, chunk: int, replicas: int, distributed: bool = True
) -> list[tuple[list[Parameter], Buffer, int]]:
    """(parameters, their buffer, ranks that share it) for everything of a model chunk, and for its spread experts."""
    parameters = chunk_parameters(shape, parallel, stage=stage, chunk=chunk)
    copies = replicas * parallel.tensor // (parallel.expert * parallel.expert_tensor_size)
    parts = ([p for p in parameters if not p.spread], replicas), ([p for p in parameters if p.spread], copies)
    bucket = parallel.reduction_bucket(replicas) if stage == chunk == 0 else None  # later ones have time
    lay = partial(lay_out, distributed=distributed, bucket_size=bucket)
    return [(part, lay(part, replicas=ranks), ranks) for part, ranks in parts if part]


@dataclass(frozen=True)
class StateBytes:
    """What training keeps from step to step on one rank."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            self.parameters + other.parameters, self.gradients + other.gradients, self.optimizer + other.optimizer
        )


@functools.lru_cache(maxsize=4096)
def state_bytes(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    stage: int,
    replicas: int,
    replica: tuple[int, int] | None = None,
    dtype: str = "bfloat16",
    distributed: bool = True,
    trained: bool = True,
) -> StateBytes:
    """Bytes of parameters, float32 gradients and Adam's states on a rank of pipeline stage ``stage``.

    Args:
        replicas: data-parallel times context-parallel size, over which a distributed optimizer is sharded.
        replica: which of them, and which of those with the same experts; None: the one that owns most.
        dtype: of the parameters; bfloat16 ones have float32 master copies in the optimizer.
        trained: False for a reference model, which has parameters only.
    """
    item = ITEM_SIZE[dtype]
    total = StateBytes(0, 0, 0)
    for chunk in range(parallel.virtual_pipeline or 1):
        parameters = chunk_parameters(shape, parallel, stage=stage, chunk=chunk)
        if not trained:
            total += StateBytes(item * sum(p.numel for p in parameters), 0, 0)
            continue
        buffers = chunk_buffers(shape, parallel, stage=stage, chunk=chunk, replicas=replicas, distributed=distributed)
        for which, (_, buffer, ranks) in enumerate(buffers):
            if not distributed:
                owned = buffer.numel
            else:
                owned = buffer.most_owned(ranks) if replica is None else buffer.owned(replica[which], ranks)
            total += StateBytes(item * buffer.numel, 4 * buffer.numel, owned * (12 if item == 2 else 8))
    return total
