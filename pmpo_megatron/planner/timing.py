"""Communication volume of training, and how long an optimizer step takes. Estimates from the stated hardware figures.

Legend: h, q, k, f as in `activations`; t, c, d, P tensor-, context-, data-parallel size and pipeline stages, V model
chunks on each; L tokens of a micro-batch on one context-parallel rank; M micro-batches of a step on one data-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.experts import mixture_flops, mixture_traffic
from pmpo_megatron.planner.hardware import Hardware
from pmpo_megatron.planner.parameters import layer_parameters


@dataclass(frozen=True)
class Work:
    """One optimizer step on one data-parallel rank: what its micro-batches hold.

    Attributes:
        tokens: L; a mean over micro-batches.
        micro_batches: M.
        responses: share of the tokens that are response tokens: only these need log-probs.
        sequence: mean length of a trajectory, with which attention's cost grows.
    """

    tokens: float
    micro_batches: int
    responses: float
    sequence: float


@dataclass(frozen=True)
class Communication:
    """What one rank sends in an optimizer step, in bytes, by kind of group; and the seconds that nothing hides."""

    tensor: float
    context: float
    pipeline: float
    experts: float
    data: float
    model_seconds: float  # tensor, context, pipeline and experts
    data_seconds: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step: products, idle pipeline stages, waiting for links."""

    compute: float
    bubble: float
    communication: Communication
    scoring: float  # of one pass without gradient over the step's tokens; not part of the step

    @property
    def seconds(self) -> float:
        return self.compute + self.bubble + self.communication.model_seconds + self.communication.data_seconds


@dataclass(frozen=True)
class TrainingCost:
    """Cost of an optimizer step of a model on a layout.

    Attributes:
        recompute, chunk: as `model.recompute` and `model.log_prob_chunk` of the configuration.
        rank_parameters: elements on the rank that holds most.
        rank_expert_parameters: of them, those that only ranks with the same experts have.
    """

    shape: ModelShape
    parallel: ParallelConfig
    hardware: Hardware
    world_size: int
    recompute: str
    chunk: int
    rank_parameters: float
    rank_expert_parameters: float = 0.0

    def forward_flops(self, work: Work) -> tuple[float, float, float]:
        """Operations for a token in a forward pass: (one layer without its MLP, its MLP or experts, the vocabulary).

        Two for each weight, and 2 q s for the two attention products over s/2 earlier tokens on average (Korthikanti et
        al., arXiv 2205.05198, appendix A, has the same products without the causal half).
        """
        shape = self.shape
        sizes = {p.name: p.numel for p in layer_parameters(shape, ParallelConfig(), 0)}
        mlp = (1 - self._sparse) * 2 * 3 * shape.ffn_hidden_size * shape.hidden_size
        if shape.experts is not None:
            mlp += self._sparse * mixture_flops(shape)
        rest = 2 * (sizes["self_attention.linear_qkv.weight"] + sizes["self_attention.linear_proj.weight"])
        attention = 2 * shape.num_attention_heads * shape.head_dim * work.sequence
        return rest + attention, mlp, 2 * shape.vocab_size * shape.hidden_size * work.responses

    def step(self, work: Work) -> StepTime:
        """The slowest stage's time for M micro-batches, stretched by the bubble, and the data-parallel reduction.

        The slowest stage is the last one, which makes log-probs. Backward costs twice forward (Narayanan et al., arXiv
        2104.04473, appendix), and the log-probs make their logits once more. The bubble is (P - 1) / (V M) of the ideal
        time (2104.04473 section 2.2.2).
        """
        rest, mlp, head = self.forward_flops(work)
        layers = self.shape.num_layers / self.parallel.pipeline
        again = {"none": 0.0, "selective": mlp, "full": rest + mlp}[self.recompute]
        flops = layers * (3 * (rest + mlp) + again) + 4 * head
        micro = work.tokens * flops / self._rate + self._head_gradient_seconds(work)
        forward = work.tokens * (layers * (rest + mlp) + head) / self._rate
        sent = self.communication(work)
        idle = (self.parallel.pipeline - 1) / ((self.parallel.virtual_pipeline or 1) * work.micro_batches)
        compute = work.micro_batches * micro
        scoring = (work.micro_batches * forward + sent.model_seconds / 3) * (1 + idle)
        return StepTime(compute, (compute + sent.model_seconds) * idle, sent, scoring)

    def communication(self, work: Work) -> Communication:
        """What one rank sends.

        Tensor: two all-reduces of [L, h] in each layer, forward and backward (Shoeybi et al., arXiv 1909.08053, section
        3), each 2 (t-1)/t of the tensor; sequence parallelism splits each into an all-gather and a reduce-scatter of the
        same volume, and gathers two inputs once more in the backward pass (2205.05198 section 4.2.2). Context: keys and
        values go round a ring, forward and, with their gradients, backward (Liu et al., arXiv 2310.01889, section 3);
        attention is computed meanwhile, so that only what outlasts it costs time. Pipeline: hidden states at each
        boundary, there and back. Experts: `experts.mixture_traffic`, instead of the MLP's half of the tensor-parallel
        volume, unless there is a shared expert. Data: reduce-scatter of float32 gradients, all-gather of bfloat16 parameters.
        """
        parallel, t, c = self.parallel, self.parallel.tensor, self.parallel.context
        layers, hidden = self.shape.num_layers / parallel.pipeline, 2 * work.tokens * self.shape.hidden_size
        passes = 2 + {"none": 0.0, "selective": 0.5, "full": 1.0}[self.recompute]
        shared = self.shape.experts is not None and self.shape.experts.shared_ffn_hidden_size is not None
        halves = 1 - (0 if shared else self._sparse / 2)
        tensor = halves * layers * hidden * (t - 1) / t * (4 * passes + (2 if parallel.sequence_parallel else 0))
        experts = 0.0
        if self.shape.experts is not None:
            rounds_of_experts = {"none": 2, "selective": 3, "full": 3}[self.recompute]
            experts = self._sparse * layers * rounds_of_experts * mixture_traffic(self.shape, parallel, work.tokens)
        rounds = 4 if self.recompute == "full" else 3
        context = rounds * layers * 4 * work.tokens * self.shape.num_query_groups * self.shape.head_dim / t * (c - 1)
        chunks = parallel.virtual_pipeline or 1
        boundary = 2 * chunks * hidden / (t if parallel.sequence_parallel else 1)
        pipeline = boundary if parallel.pipeline > 1 else 0.0
        replicas = self.world_size // (t * parallel.pipeline)
        copies = parallel.expert_data_parallel_size(self.world_size)
        rest = self.rank_parameters - self.rank_expert_parameters
        data = 6 * (rest * (replicas - 1) / replicas + self.rank_expert_parameters * (copies - 1) / copies)
        link, count = self.hardware.link, work.micro_batches
        waiting = max(0.0, context / link(t * c) - self._attention_seconds(work, rounds)) if c > 1 else 0.0
        across = experts / link(parallel.expert * parallel.expert_tensor_size)
        model_seconds = count * (tensor / link(t) + waiting + pipeline / link(self.world_size) + across)
        data_seconds = data / link(self.world_size // parallel.pipeline)
        sent = (count * tensor, count * context, count * pipeline, count * experts, data)
        return Communication(*sent, model_seconds, data_seconds)

    @property
    def _sparse(self) -> float:
        """Share of the layers that have experts."""
        return self.shape.experts.num_sparse_layers / self.shape.num_layers if self.shape.experts else 0.0

    @property
    def _rate(self) -> float:
        """FLOP/s of a tensor-parallel group."""
        return self.hardware.peak_flops * self.hardware.matmul_efficiency * self.parallel.tensor

    def _attention_seconds(self, work: Work, rounds: int) -> float:
        layers = self.shape.num_layers / self.parallel.pipeline
        flops = 2 * self.shape.num_attention_heads * self.shape.head_dim * work.sequence
        return rounds * layers * work.tokens * flops / self._rate

    def _head_gradient_seconds(self, work: Work) -> float:
        """The head's float32 gradient is written, read, added to and written for each chunk of response tokens."""
        rows = self.shape.padded_vocab_size(self.parallel.tensor) / self.parallel.tensor
        chunks = -(-work.tokens * work.responses // self.chunk)
        return 4 * 4 * rows * self.shape.hidden_size * chunks / self.hardware.memory_bytes_per_s
