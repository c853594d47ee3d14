"""What a layer's mixture of experts keeps for its backward pass, computes and sends.

Every token of a rank goes to k of E experts: its hidden state is copied k times, sent to the ranks that hold these experts
(all to all, over the expert-parallel group), there gathered over the expert-tensor-parallel group, and the results come back
the same way (megatron-core, token_dispatcher.py, MoEAlltoAllTokenDispatcher).

Legend: k experts of a token, E experts of a layer, t tensor-parallel size, e expert-parallel size, x tensor-parallel size of
experts, L tokens of the micro-batch on one context-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.parallel.state import ParallelConfig

FLOAT32 = 4
BUSIEST = 1.25  # tokens on the fullest expert-parallel rank, of an even share: an assumption; no token is ever dropped


@dataclass(frozen=True)
class MixtureBytes:
    """Bytes per token of L: what is kept for the backward pass, and what one layer's backward pass needs beside it."""

    kept: float
    working: float


def mixture_bytes(shape: ModelShape, parallel: ParallelConfig, *, item: int, fused: bool) -> MixtureBytes:
    """Of one layer with experts, its router's input excluded.

    Transformer Engine's grouped products keep what a dense MLP keeps, for k tokens instead of one: an estimate. For our own
    layers without expert parallelism the count is exact for megatron-core 0.16.1, and within a hundredth above 0.19.2's, whose
    router keeps one tensor less where weights are not normalised.
    """
    experts = shape.experts
    assert experts is not None
    busiest = BUSIEST if parallel.expert > 1 else 1.0
    copies = busiest * experts.per_token * parallel.expert_tensor_size / parallel.tensor  # of a token, on the fullest rank
    width = experts.ffn_hidden_size / parallel.expert_tensor_size
    shared = (experts.shared_ffn_hidden_size or 0) / parallel.tensor
    weights = experts.num_experts + 2 * experts.per_token if experts.normalized else 2 * experts.num_experts + experts.per_token
    router = FLOAT32 * weights / parallel.tensor
    dispatched = item * copies * shape.hidden_size
    gated = item * (shape.hidden_size + 1) / parallel.tensor if shared else 0.0  # the shared expert's output, and its gate
    # Ours, as a dense MLP: both halves of the first product, SiLU of one, and what the second takes; here also before weighing.
    kept = dispatched + copies * item * (3 if fused else 6) * width + item * (3 if fused else 5) * shared + gated + router
    working = 2 * dispatched + item * 3 * (copies * width + shared) + 2 * router
    return MixtureBytes(kept, working)


def mixture_flops(shape: ModelShape) -> float:
    """Operations of a layer with experts for a token in a forward pass: two for each weight that it meets."""
    experts = shape.experts
    assert experts is not None
    widths = experts.per_token * experts.ffn_hidden_size + (experts.shared_ffn_hidden_size or 0)
    return 2 * shape.hidden_size * (experts.num_experts + 3 * widths)


def mixture_traffic(shape: ModelShape, parallel: ParallelConfig, tokens: float) -> float:
    """Bytes that a rank sends for one layer with experts there and back, in one pass forward or backward, in bfloat16.

    Of k copies of its L / t tokens (e - 1) / e leave the rank; each expert-tensor-parallel rank then sends what it got to the
    x - 1 others. The same again with the results.
    """
    experts = shape.experts
    assert experts is not None
    copies = 2 * experts.per_token * tokens / parallel.tensor * shape.hidden_size
    return 2 * copies * ((parallel.expert - 1) / parallel.expert + parallel.expert_tensor_size - 1)


def experts_left_out(shape: ModelShape, running: int) -> float:
    """Of the experts that one token does not use, the share that none of ``running`` tokens of a decoding step uses.

    Every expert is taken to be as likely as another.
    """
    return (1 - shape.experts.per_token / shape.experts.num_experts) ** (running - 1) if shape.experts else 0.0
