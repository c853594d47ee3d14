"""The activation count against the published formulas, and micro-batches in flight against a simulated schedule."""

import pytest

from pmpo_megatron.hf.known_models import known_shape
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.activations import ActivationModel, activation_bytes, layers_in_flight

SHAPE = known_shape("meta-llama/Llama-3.3-70B-Instruct")


def kept(recompute="none", **options):
    return ActivationModel(SHAPE, ParallelConfig(**options), recompute).layer_kept()


def test_terms_of_a_llama_layer_by_hand():
    """Llama 70B: h = q = 8192, k = 1024, f = 28672; bfloat16; 64 log-sum-exps in float32."""
    hidden = 4 * 8192  # inputs of two norms, inputs of two products
    attention = (8192 + 2 * 1024) + (8192 + 1024) + 8192  # projection, rotated queries and keys, output
    assert kept() == 2 * (hidden + attention + 3 * 28672) + 4 * 64


@pytest.mark.parametrize("tensor", (2, 4, 8))
def test_tensor_and_sequence_parallelism_divide_as_published(tensor):
    """2205.05198: without sequence parallelism the norms' and products' inputs stay whole (equation 2, without its
    dropout masks: 8 s b h); with it everything is divided (equation 4)."""
    whole, inputs = kept(), 2 * 4 * SHAPE.hidden_size
    assert kept(tensor=tensor) == inputs + (whole - inputs) / tensor
    assert kept(tensor=tensor, sequence_parallel=True) == whole / tensor


def test_full_recomputation_keeps_two_bytes_per_hidden_element():
    """2205.05198 table 2: 2 s b h a layer."""
    assert kept("full") == 2 * SHAPE.hidden_size


def test_selective_recomputation_drops_the_mlp():
    assert kept("none") - kept("selective") == 2 * (SHAPE.hidden_size + 3 * SHAPE.ffn_hidden_size)


def simulate(stages, stage, micro_batches):
    """Largest number of micro-batches between forward and backward: P - i - 1 forwards, then one of each in turn."""
    warm_up = min(micro_batches, stages - stage - 1)
    held = most = warm_up
    for _ in range(micro_batches - warm_up):
        held += 1
        most = max(most, held)
        held -= 1
    return most


@pytest.mark.parametrize("micro_batches", (1, 2, 3, 8, 32))
@pytest.mark.parametrize("stages", (1, 2, 4, 8))
def test_micro_batches_in_flight(stages, micro_batches):
    parallel = ParallelConfig(pipeline=stages)
    for stage in range(stages):
        layers = layers_in_flight(SHAPE, parallel, stage=stage, micro_batches=micro_batches)
        assert layers == SHAPE.num_layers / stages * simulate(stages, stage, micro_batches)


@pytest.mark.parametrize(("stages", "chunks"), ((2, 2), (4, 2), (4, 5), (8, 2)))
def test_interleaving_costs_the_first_stage_what_is_published(stages, chunks):
    """2205.05198 section 4.2.3: L (1 + (p - 1) / (p m)) layers."""
    parallel = ParallelConfig(pipeline=stages, virtual_pipeline=chunks)
    found = layers_in_flight(SHAPE, parallel, stage=0, micro_batches=64)
    assert found == pytest.approx(SHAPE.num_layers * (1 + (stages - 1) / (stages * chunks)))
    assert layers_in_flight(SHAPE, parallel, stage=0, micro_batches=1) == SHAPE.num_layers / stages


def test_log_probs_never_hold_the_whole_logits():
    """The chunk's logits and the head's gradient: far below [tokens, vocabulary] float32, and growing with the chunk."""
    model = ActivationModel(SHAPE, ParallelConfig(tensor=8, sequence_parallel=True), "full")
    rows = 128256 / 8
    tokens, chunk = 32768, 1024
    head, states = rows * 8192 * 8, 2 * 2 * tokens * 8192
    assert model.log_prob_chunk(chunk, tokens) == chunk * rows * 6 + head + states
    assert model.log_prob_chunk(chunk, tokens) - head - states < tokens * rows * 4 / 20


def test_only_the_last_stage_makes_log_probs_and_the_first_holds_most():
    parallel = ParallelConfig(tensor=8, sequence_parallel=True, pipeline=4)
    model = ActivationModel(SHAPE, parallel, "none")
    stages = [activation_bytes(model, tokens=4096, stage=s, micro_batches=16, chunk=256) for s in range(4)]
    assert [stage.log_probs > 0 for stage in stages] == [False, False, False, True]
    assert [stage.kept for stage in stages] == sorted((stage.kept for stage in stages), reverse=True)
    assert stages[0].kept == pytest.approx(4096 * (80 * model.layer_kept() + 4 * 2 * 8192 / 8))
