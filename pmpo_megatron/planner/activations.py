"""Activation memory of one micro-batch, and how many micro-batches a pipeline stage holds at once.

Method: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section 4:
add up every tensor that a layer keeps for its backward pass. Their layer (LayerNorm, GELU, dropout, explicit attention
scores) gives equation 1, s b h (34 + 5 a s / h); equation 4 divides by the tensor-parallel size under sequence
parallelism. Ours is a Llama or Qwen layer (RMSNorm, grouped queries, SwiGLU, no dropout), and the attention keeps no
scores but one float per query and head (FlashAttention, arXiv 2205.14135, section 3.1), so the terms are counted anew in
`layer_terms`. The count for our own layers on CPU is exact, which a test shows on real processes; that of Transformer
Engine's layers follows the same tensors and is an estimate, as are the working buffers. A mixture of experts (`experts`) takes
the place of the MLP; where some layers have one and others not, every layer is taken for the mean of all.

Legend: h hidden size, q and k width of all query heads and of all key heads, f width of the MLP, t tensor-parallel size,
L tokens of the micro-batch on one context-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.experts import MixtureBytes, mixture_bytes

FLOAT32 = 4


@dataclass(frozen=True)
class ActivationModel:
    """Activation bytes of a model on a layout.

    Attributes:
        item: bytes of an activation: 2 for bfloat16.
        fused: Transformer Engine's layers; else our own, which keep more (`model.layers`).
    """

    shape: ModelShape
    parallel: ParallelConfig
    recompute: str
    item: int = 2
    fused: bool = True

    def layer_terms(self) -> dict[str, float]:
        """Bytes per token of L that a layer keeps for its backward pass without recomputation, by what they are."""
        shape, tensor = self.shape, self.parallel.tensor
        queries, keys = shape.num_attention_heads * shape.head_dim / tensor, shape.num_query_groups * shape.head_dim / tensor
        # The value is a view of the fused projection's output and keeps all of it; rotated queries and keys are new.
        attention = (queries + 2 * keys) + (queries + keys) + queries
        normalised = queries + keys if shape.qk_norm else 0  # what the norms of queries and keys keep
        terms = {
            "norms": self.item * self._hidden() * 2,
            "attention": self.item * (self._hidden() + attention + normalised) + FLOAT32 * shape.num_attention_heads / tensor,
            "mlp input": self.item * self._hidden(),
            "mlp": self._dense * self.item * 3 * shape.ffn_hidden_size / tensor + self._mixture().kept,
        }
        return terms if self.fused else self._unfused(terms, queries, keys)

    def _unfused(self, terms: dict[str, float], queries: float, keys: float) -> dict[str, float]:
        """`layer_terms` of our own layers (`model.layers`), for packed sequences without context parallelism.

        torch's norm keeps the normalised input and 1/rms beside its input, SiLU its two halves, the rotation sines and
        cosines of all tokens. Attention has rotated queries and keys, a copy of the values, and its output by runs and whole.
        """
        shape, tensor = self.shape, self.parallel.tensor
        attention = (queries + 2 * keys) + queries + queries + 4 * shape.head_dim
        attention += 2 * keys * (self.parallel.context - 1)  # keys and values of all ranks, gathered: an estimate
        scalars = shape.num_attention_heads / tensor
        if shape.qk_norm:
            groups = shape.num_query_groups // tensor
            attention += (queries + 2 * keys) + queries + keys  # the projection's output, through views; what is normalised
            attention += queries if groups > 1 else 0  # queries of several groups are copied out of the projection
            scalars += shape.num_attention_heads / tensor + groups
        return terms | {
            "norms": 2 * (2 * self.item * self._hidden() + self._inverse_rms()),
            "attention": self.item * (self._hidden() + attention) + FLOAT32 * scalars,
            "mlp": self._dense * self.item * 5 * shape.ffn_hidden_size / tensor + self._mixture().kept,
        }

    def layer_kept(self) -> float:
        """Bytes per token of L that a layer keeps, with recomputation."""
        if self.recompute == "full":  # its input alone (2205.05198 section 5: "full activation recomputation")
            return self.item * self._hidden()
        terms = self.layer_terms()
        if self.recompute == "selective":
            # Only the MLP is computed again. Transformer Engine's first product contains the norm, so its input,
            # which the norm keeps anyway, is where the recomputation starts; ours starts after the norm.
            terms.pop("mlp")
            if self.fused:
                terms["mlp input"] *= 1 - self._dense  # the norm before experts is a layer of its own, whose output they keep
        return sum(terms.values())

    def ends_kept(self, *, last: bool) -> float:
        """Bytes per token of L outside the layers: the final norm, and the hidden states that log-probs are made of."""
        if not last:
            return self.item * self._hidden()  # the stage's output, kept until the next stage's gradient arrives
        norm = self.item * self._hidden() * (1 if self.fused else 2) + self._inverse_rms()
        head = self.item * self.shape.hidden_size + FLOAT32 * 4  # log-sum-exp, mean logit, log-prob and entropy
        return norm + head

    def layer_working(self) -> float:
        """Bytes per token of L while one layer goes backward: gradients, gathered inputs, what is computed again.

        An estimate: the MLP's backward pass holds the gradients of its three products and, under sequence parallelism,
        the gathered input and the gradient before it is scattered (2205.05198 section 4.2.2).
        """
        mlp = self._dense * self.item * 3 * self.shape.ffn_hidden_size / self.parallel.tensor + self._mixture().working
        again = {"none": 0.0, "selective": mlp, "full": sum(self.layer_terms().values())}[self.recompute]
        return mlp + self.item * (2 * self.shape.hidden_size + self._hidden()) + again

    def weight_gradient(self) -> float:
        """Bytes of the largest weight gradient of a layer, before it is added to the float32 buffer."""
        experts, dense = self.shape.experts, 2 * self.shape.ffn_hidden_size * self.shape.hidden_size / self.parallel.tensor
        if experts is None:
            return self.item * dense
        here = experts.num_experts / self.parallel.expert if self.fused else 1  # grouped products make those of all experts
        return self.item * here * 2 * experts.ffn_hidden_size * self.shape.hidden_size / self.parallel.expert_tensor_size

    def log_prob_chunk(self, chunk: int, tokens: float) -> float:
        """Bytes at the log-probs' peak, in the backward pass (`model.log_probs._ChunkedLogProbs`).

        A chunk's logits in float32, which become their gradient, with a copy of the model's dtype; the head's gradient in
        float32 and the chunk's part of it beside it; the gradients of the hidden states.
        """
        rows = self.shape.padded_vocab_size(self.parallel.tensor) / self.parallel.tensor
        copies = 0 if self.item == FLOAT32 else 1
        logits = min(chunk, tokens) * rows * (FLOAT32 + self.item * copies)
        head = rows * self.shape.hidden_size * FLOAT32 * (1 + copies)
        return logits + head + 2 * tokens * self.shape.hidden_size * self.item

    def embedding_gradient(self) -> float:
        rows = self.shape.padded_vocab_size(self.parallel.tensor) / self.parallel.tensor
        return self.item * rows * self.shape.hidden_size

    @property
    def _dense(self) -> float:
        """Share of the layers that have one MLP."""
        return 1 - (self.shape.experts.num_sparse_layers / self.shape.num_layers if self.shape.experts else 0)

    def _mixture(self) -> MixtureBytes:
        """Bytes per token of L in a layer with experts, times the share of such layers."""
        if self.shape.experts is None:
            return MixtureBytes(0.0, 0.0)
        found = mixture_bytes(self.shape, self.parallel, item=self.item, fused=self.fused)
        share = 1 - self._dense
        return MixtureBytes(share * found.kept, share * found.working)

    def _inverse_rms(self) -> float:
        """Bytes per token of L that a norm keeps beside its input: one number for each row that this rank has."""
        return FLOAT32 * self._hidden() / self.shape.hidden_size

    def _hidden(self) -> float:
        """Elements per token of a tensor of hidden states between the matrix products."""
        return self.shape.hidden_size / (self.parallel.tensor if self.parallel.sequence_parallel else 1)


def layers_in_flight(shape: ModelShape, parallel: ParallelConfig, *, stage: int, micro_batches: int) -> float:
    """Layers times micro-batches whose activations a stage holds at the schedule's peak.

    1F1B: stage i holds min(M, P - i) micro-batches of its L / P layers (Narayanan et al., arXiv 2104.04473, section 2.2.1).
    Interleaved: 2 (P - i - 1) + (V - 1) P + 1 chunks of L / (P V) layers are in flight (megatron-core, schedules.py,
    get_pp_rank_microbatches), for the first stage L (1 + (P - 1) / (P V)), as in 2205.05198 section 4.2.3.
    """
    chunks = parallel.virtual_pipeline or 1
    layers = shape.num_layers / (parallel.pipeline * chunks)
    behind = parallel.pipeline - stage - 1
    if chunks == 1:
        return layers * min(micro_batches, behind + 1)
    return layers * min(micro_batches * chunks, 2 * behind + (chunks - 1) * parallel.pipeline + 1)


@dataclass(frozen=True)
class ActivationBytes:
    """What a stage needs beside its weights at the peak of an optimizer step."""

    kept: float
    working: float
    log_probs: float

    @property
    def total(self) -> float:
        return self.kept + max(self.working, self.log_probs)  # the log-probs are done before the layers go backward


def activation_bytes(model: ActivationModel, *, tokens: float, stage: int, micro_batches: int, chunk: int) -> ActivationBytes:
    """Activations of a rank on pipeline stage ``stage``, with ``tokens`` (L) in every micro-batch."""
    parallel = model.parallel
    last = stage == parallel.pipeline - 1
    layers = layers_in_flight(model.shape, parallel, stage=stage, micro_batches=micro_batches)
    held = min(micro_batches, parallel.pipeline - stage)
    kept = tokens * (layers * model.layer_kept() + held * model.ends_kept(last=last))
    working = max(tokens * model.layer_working() + model.weight_gradient(), model.embedding_gradient() if stage == 0 else 0)
    return ActivationBytes(kept, working, model.log_prob_chunk(chunk, tokens) if last else 0.0)
