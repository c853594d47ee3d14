"""Costs against closed formulas: 6 N D, recomputation's 4/3, ring volumes, the pipeline's bubble, KV cache sizes."""

from dataclasses import replace

import pytest

from pmpo_megatron.hf.known_models import known_shape
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.engine import decoding_step, engine_bytes, engine_problems, generation_time
from pmpo_megatron.planner.hardware import HARDWARE
from pmpo_megatron.planner.parameters import active_parameters, total_parameters
from pmpo_megatron.planner.timing import TrainingCost, Work
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.units import GIB

H100 = HARDWARE["h100-80gb"]
LLAMA, QWEN = known_shape("meta-llama/Llama-3.3-70B-Instruct"), known_shape("Qwen/Qwen2.5-7B")
WORK = Work(tokens=8192, micro_batches=8, responses=1.0, sequence=1.0)


def cost(shape=LLAMA, world_size=8, recompute="none", chunk=10**9, **options):
    return TrainingCost(shape, ParallelConfig(**options), H100, world_size, recompute, chunk, rank_parameters=1e9)


def test_compute_is_six_flops_for_each_parameter_and_token():
    """Short sequences: 6 N D, N without the embedding, which is looked up; the log-probs make their logits once more."""
    head = LLAMA.vocab_size * LLAMA.hidden_size
    flops = (6 * (total_parameters(LLAMA) - head) + 2 * head) * 8 * 8192
    expected = flops / (H100.peak_flops * H100.matmul_efficiency * 8)
    model = cost(tensor=8)
    gradient = 8 * model._head_gradient_seconds(WORK)
    assert model.step(WORK).compute - gradient == pytest.approx(expected, rel=1e-3)


def test_attention_adds_two_products_over_half_the_sequence():
    short, long = (cost().forward_flops(replace(WORK, sequence=s))[0] for s in (0.0, 131072.0))
    assert long - short == 2 * (2 * 64 * 128) * (131072 / 2)


def test_full_recomputation_costs_one_more_forward_pass():
    work = replace(WORK, responses=0.0)
    assert cost(recompute="full").step(work).compute == pytest.approx(4 / 3 * cost().step(work).compute)
    assert 1 < cost(recompute="selective").step(work).compute / cost().step(work).compute < 4 / 3


def test_the_bubble_shrinks_with_micro_batches_and_interleaving():
    plain = cost(pipeline=4, world_size=4).step(WORK)
    assert plain.bubble == pytest.approx((plain.compute + plain.communication.model_seconds) * 3 / 8)
    interleaved = cost(pipeline=4, virtual_pipeline=5, world_size=4).step(WORK)
    assert interleaved.bubble < plain.bubble / 4
    assert interleaved.communication.pipeline == 5 * plain.communication.pipeline


def test_volumes_of_the_groups():
    none = cost(world_size=1).communication(WORK)
    assert (none.tensor, none.context, none.pipeline, none.data) == (0, 0, 0, 0)
    hidden = 2 * 8192 * 8192  # bytes of [L, h]
    tensor = cost(tensor=8).communication(WORK)
    assert tensor.tensor == pytest.approx(8 * 80 * 4 * (2 * 7 / 8) * hidden)  # four all-reduces a layer
    data = cost(world_size=8).communication(WORK)
    assert data.data == pytest.approx(7 / 8 * 6e9)
    context = cost(context=4, world_size=4).communication(WORK)
    assert context.context == pytest.approx(8 * 80 * 3 * 3 * (2 * 2 * 8192 * 8 * 128))  # K and V, and their gradients


MIXTURE = known_shape("Qwen/Qwen3-30B-A3B")


def test_a_token_costs_what_it_uses_of_a_mixture():
    """Short sequences: 6 flops for each parameter that a token uses, without the embedding."""
    head = MIXTURE.vocab_size * MIXTURE.hidden_size
    flops = (6 * (active_parameters(MIXTURE) - head) + 2 * head) * 8 * 8192
    model = cost(shape=MIXTURE, expert=8)
    gradient = 8 * model._head_gradient_seconds(WORK)
    rate = H100.peak_flops * H100.matmul_efficiency
    assert model.step(WORK).compute - gradient == pytest.approx(flops / rate, rel=2e-3)


def test_tokens_go_to_their_experts_and_back():
    """8 copies of every token, 7 of 8 of them to other ranks, there and back, forward and backward, in 48 layers."""
    copies = 2 * 8 * 8192 * 2048  # bytes of one micro-batch's
    sent = cost(shape=MIXTURE, expert=8).communication(WORK)
    assert sent.experts == pytest.approx(8 * 48 * 2 * 2 * copies * 7 / 8)
    assert cost(shape=MIXTURE).communication(WORK).experts == 0
    split = cost(shape=MIXTURE, tensor=2, sequence_parallel=True, expert=4, expert_tensor=1).communication(WORK)
    assert split.experts == pytest.approx(8 * 48 * 2 * 2 * copies / 2 * 3 / 4)
    assert split.tensor == pytest.approx(8 * 48 * (2 * 2 + 1) * 2 * 8192 * 2048 / 2), "attention's half alone"


def test_a_decoding_step_reads_the_experts_that_its_tokens_meet():
    """One token: the parameters that it uses. 128 experts are all met by a thousand tokens."""
    rollout = RolloutConfig(tensor_parallel=1, enforce_eager=True)
    found = engine_bytes(MIXTURE, rollout, H100)
    rate = H100.memory_bytes_per_s * H100.decode_memory_efficiency
    for running, parameters in ((1, active_parameters(MIXTURE)), (1000, total_parameters(MIXTURE))):
        seconds = decoding_step(MIXTURE, rollout, found, H100, running=running, context=0.0)
        assert seconds == pytest.approx(2 * parameters / rate + H100.decode_overhead_s)


def test_groups_inside_a_node_use_nvlink():
    assert H100.link(8) == 9 * H100.link(16)


def test_small_chunks_of_log_probs_cost_memory_traffic():
    """Every chunk goes over the head's gradient: 256 tokens at a time are dearer than 2048."""
    assert cost(shape=QWEN, chunk=256).step(WORK).compute > 1.05 * cost(shape=QWEN, chunk=2048).step(WORK).compute


def test_kv_cache_of_known_models():
    """320 KiB per token for Llama 70B, 56 KiB for Qwen2.5 7B; groups are repeated beyond their number."""
    assert engine_bytes(LLAMA, RolloutConfig(), H100).kv_per_token == 320 * 1024
    assert engine_bytes(LLAMA, RolloutConfig(tensor_parallel=8), H100).kv_per_token == 40 * 1024
    assert engine_bytes(QWEN, RolloutConfig(), H100).kv_per_token == 56 * 1024
    assert engine_bytes(QWEN, RolloutConfig(tensor_parallel=28), H100).kv_per_token == 14 * 1024


def test_vllms_share_is_weights_forward_pass_and_cache():
    found = engine_bytes(QWEN, RolloutConfig(gpu_memory_utilization=0.5), H100)
    assert found.total == pytest.approx(0.5 * H100.memory_gib * GIB)
    explicit = engine_bytes(QWEN, RolloutConfig(kv_cache_gib=8.0), H100)
    assert explicit.kv_cache == 8 * GIB and explicit.total == explicit.weights + explicit.forward + explicit.graphs + 8 * GIB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 8}, "8 must divide the model's 28 heads"),
        ({"max_model_len": 200000}, "above the model's 131072 positions"),
        ({"gpu_memory_utilization": 0.2, "max_model_len": 8192}, "room for 0 tokens, and one request may need 8192"),
    ],
)
def test_why_vllm_would_not_start(options, message):
    rollout = RolloutConfig(**({"max_model_len": 8192} | options))
    problems = engine_problems(QWEN, rollout, engine_bytes(QWEN, rollout, H100))
    assert any(message in problem for problem in problems), problems


def test_engines_share_the_requests():
    """Two engines with half of the requests each take as long as one with half of them, and make twice as much."""
    one, two = (RolloutConfig(tensor_parallel=4, max_num_seqs=256, engines=engines) for engines in (1, 2))
    found = engine_bytes(QWEN, one, H100)
    assert engine_bytes(QWEN, two, H100) == found, "each holds the whole model"
    args = dict(context=2000, response=1500)
    half = generation_time(QWEN, one, SamplingConfig(max_tokens=3000), found, H100, requests=512, **args)
    both = generation_time(QWEN, two, SamplingConfig(max_tokens=3000), found, H100, requests=1024, **args)
    assert both.seconds == half.seconds and both.tokens_per_s == pytest.approx(2 * half.tokens_per_s)


def test_generation_is_bound_by_memory_and_gains_from_batches():
    rollout = RolloutConfig(tensor_parallel=4, max_num_seqs=256)
    found = engine_bytes(QWEN, rollout, H100)
    args = (QWEN, rollout, SamplingConfig(max_tokens=3000), found, H100)
    one = generation_time(*args, requests=1, context=2000, response=1500)
    many = generation_time(*args, requests=1024, context=2000, response=1500)
    assert many.running == 256 and one.running == 1
    assert many.tokens_per_s > 50 * one.tokens_per_s
    step = decoding_step(QWEN, rollout, found, H100, running=1, context=2000 - 750)
    assert one.seconds == pytest.approx(1500 * step + 1500 * step)  # the mean response, and on to the longest
    assert step > found.weights / (H100.memory_bytes_per_s * H100.decode_memory_efficiency)
