"""Memory of the rollout engine (vLLM) on its GPUs, and how long a round of rollouts takes.

vLLM allots itself ``gpu_memory_utilization`` of a GPU's whole memory; what weights and the largest forward pass leave of it
is KV cache (vLLM documentation, "Engine Arguments" and "Conserving Memory"). Keys and values take 2 * layers * groups *
head_dim elements per token (Kwon et al., arXiv 2309.06180, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.planner.experts import experts_left_out
from pmpo_megatron.planner.hardware import Hardware
from pmpo_megatron.planner.parameters import active_parameters, total_parameters
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.units import GIB, ITEM_SIZE, resolve_dtype

PREFILL_TOKENS = 16384  # tokens of the largest forward pass; vLLM's default for offline use on GPUs of 70 GiB and more
CUDA_GRAPHS_GIB = 1.5  # an assumption; 0 with enforce_eager
ALL_REDUCE_S = 15e-6  # an assumption: one small all-reduce inside a node


@dataclass(frozen=True)
class EngineBytes:
    """Memory on each of the engine's GPUs, in bytes."""

    weights: float
    forward: float  # activations of the largest forward pass, logits of all requests
    graphs: float
    kv_cache: float
    kv_per_token: float

    @property
    def total(self) -> float:
        return self.weights + self.forward + self.graphs + max(self.kv_cache, 0.0)

    def held(self, sleep: str) -> float:
        """While it sleeps so (`RolloutConfig.sleep`): CUDA graphs stay."""
        return self.total if sleep == "none" else self.graphs + (self.weights if sleep == "kv" else 0.0)

    @property
    def kv_tokens(self) -> int:
        return max(0, int(self.kv_cache / self.kv_per_token))


def engine_bytes(shape: ModelShape, rollout: RolloutConfig, hardware: Hardware) -> EngineBytes:
    """What vLLM takes of each of its GPUs; a negative KV cache means that its share is too small."""
    item, size = ITEM_SIZE[resolve_dtype(rollout.dtype, "cuda")], rollout.tensor_parallel
    groups = max(1, math.ceil(shape.num_query_groups / size))  # vLLM repeats groups where there are fewer than GPUs
    kv_per_token = 2 * shape.num_layers * groups * shape.head_dim * item
    vocabulary = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    in_layers = 1 if rollout.quantization == "fp8" else item
    weights = (in_layers * (total_parameters(shape) - vocabulary) + item * vocabulary) / size
    logits = 3 * 4 * rollout.max_num_seqs * shape.vocab_size  # log-probs in float32, sorted or copied: an assumption
    widest = PREFILL_TOKENS * item * (4 * shape.hidden_size + 3 * _width(shape) / size)
    forward, graphs = max(logits, widest), 0 if rollout.enforce_eager else CUDA_GRAPHS_GIB * GIB
    share = rollout.gpu_memory_utilization * hardware.memory_gib * GIB
    kv_cache = share - weights - forward - graphs if rollout.kv_cache_gib is None else rollout.kv_cache_gib * GIB
    return EngineBytes(weights, forward, graphs, kv_cache, kv_per_token)


def _width(shape: ModelShape) -> float:
    """Of the widest layer's MLP or, for one token, experts, with the copies of its hidden state that go to them."""
    experts = shape.experts
    if experts is None:
        return shape.ffn_hidden_size
    return experts.per_token * (experts.ffn_hidden_size + shape.hidden_size / 3) + (experts.shared_ffn_hidden_size or 0)


def split_problem(shape: ModelShape, size: int) -> str | None:
    """Why vLLM cannot split the model over ``size`` GPUs; None if it can."""
    if shape.num_attention_heads % size == 0 and (shape.num_query_groups % size == 0 or size % shape.num_query_groups == 0):
        return None
    return (
        f"{size} must divide the model's {shape.num_attention_heads} heads and divide, or be a multiple of, its "
        f"{shape.num_query_groups} key-value groups"
    )


def engine_problems(shape: ModelShape, rollout: RolloutConfig, engine: EngineBytes) -> list[str]:
    """Why vLLM would not start, or not have room for one request. Lengths of prompt and response: `training.checks`."""
    split = split_problem(shape, rollout.tensor_parallel)
    problems = [f"rollout.tensor_parallel: {split}"] if split else []
    limit = rollout.max_model_len or shape.max_position_embeddings
    if limit > shape.max_position_embeddings:
        problems.append(f"rollout.max_model_len: {limit} is above the model's {shape.max_position_embeddings} positions")
    forward = engine.forward + engine.graphs
    if engine.kv_tokens < limit:
        problems.append(
            f"rollout.gpu_memory_utilization: the KV cache has room for {engine.kv_tokens} tokens, and one request may need "
            f"{limit} (weights {engine.weights / GIB:.1f} GiB, forward pass {forward / GIB:.1f} GiB); raise it, raise "
            "rollout.tensor_parallel, or lower rollout.max_model_len or rollout.max_num_seqs"
        )
    return problems


def engine_nodes(rollout: RolloutConfig, world_size: int, hardware: Hardware) -> int:
    """Nodes on which vLLM runs."""
    return 1 if rollout.nodes == "first" else math.ceil(world_size / hardware.gpus_per_node)


@dataclass(frozen=True)
class GenerationTime:
    """How long the engines take for a round's rollouts.

    Attributes:
        running: requests in one batch of an engine while there are enough of them.
        tokens_per_s: response tokens of all engines.
    """

    seconds: float
    running: int
    tokens_per_s: float


def generation_time(
    shape: ModelShape,
    rollout: RolloutConfig,
    sampling: SamplingConfig,
    engine: EngineBytes,
    hardware: Hardware,
    *,
    requests: int,
    context: float,
    response: float,
    nodes: int = 1,
) -> GenerationTime:
    """A decoding step reads all weights and the KV cache of the running requests once (2309.06180 section 2.2: memory-bound).

    Args:
        context: mean tokens of a finished request with its prompt; half of the response is there on average.
        response: mean tokens of a response.
        nodes: on which ``rollout.engines`` engines run each.
    """
    mean_context = context - response / 2
    share = math.ceil(requests / (rollout.engines * nodes))
    running = max(1, min(share, rollout.max_num_seqs, int(engine.kv_tokens / max(1.0, mean_context))))
    step = decoding_step(shape, rollout, engine, hardware, running=running, context=mean_context)
    alone = decoding_step(shape, rollout, engine, hardware, running=1, context=mean_context)
    full = share * response / running * step
    tail = max(0.0, sampling.max_tokens - response) * alone  # the longest response ends alone
    return GenerationTime(full + tail, running, requests * response / (full + tail))


def decoding_step(
    shape: ModelShape, rollout: RolloutConfig, engine: EngineBytes, hardware: Hardware, *, running: int, context: float
) -> float:
    """Seconds in which every running request gets one token. Of experts those are read that some request needs."""
    unused = (1 - active_parameters(shape) / total_parameters(shape)) * experts_left_out(shape, running)
    read = engine.weights * (1 - unused) + running * context * engine.kv_per_token
    memory = read / (hardware.memory_bytes_per_s * hardware.decode_memory_efficiency)
    flops = 2 * active_parameters(shape) / rollout.tensor_parallel * running
    compute = flops / (hardware.peak_flops * hardware.matmul_efficiency)
    reduce = 2 * shape.num_layers * ALL_REDUCE_S if rollout.tensor_parallel > 1 else 0.0
    return max(memory, compute) + reduce + hardware.decode_overhead_s
