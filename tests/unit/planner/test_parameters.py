"""Sizes of published models, and properties of Megatron's buffers that hold for every layout."""

import math

import pytest

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.known_models import ROWS, known_shape, model_shape
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.parameters import (
    active_parameters,
    chunk_parameters,
    lay_out,
    spread_parameters,
    state_bytes,
    total_parameters,
)

# Elements of the published checkpoints' tensors.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen/Qwen2.5-Coder-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    assert total_parameters(known_shape(name)) == PUBLISHED[name]


@pytest.mark.parametrize(
    "name, published",
    [
        ("Qwen/Qwen3-30B-A3B", 3.3e9),
        ("Qwen/Qwen3-235B-A22B", 22e9),
        ("Qwen/Qwen1.5-MoE-A2.7B", 2.7e9),
        ("mistralai/Mixtral-8x7B-v0.1", 12.9e9),
        ("Qwen/Qwen3-8B", 8.2e9),
    ],
)
def test_parameters_that_a_token_uses(name, published):
    assert active_parameters(known_shape(name)) == pytest.approx(published, rel=0.02)


def test_spread_experts_have_a_buffer_that_copies_of_them_share():
    """8 of 128 experts on each of 16 ranks, no copies: their states are not divided; the rest's are, over 4 * 4 ranks."""
    shape, parallel = known_shape("Qwen/Qwen3-30B-A3B"), ParallelConfig(tensor=1, expert=16)
    experts, rest = 48 * 8 * 3 * 768 * 2048, 30_532_122_624 - 48 * 128 * 3 * 768 * 2048
    assert spread_parameters(shape, parallel) == experts
    found = state_bytes(shape, parallel, stage=0, replicas=16)
    assert found.optimizer == pytest.approx(12 * (experts + rest / 16), rel=1e-3)
    assert found.gradients == pytest.approx(4 * (experts + rest), rel=1e-3)


def test_every_known_model_has_a_shape_and_is_found_by_its_directory():
    for name in ROWS:
        assert known_shape(f"/models/{name.split('/')[1]}/") == known_shape(name) == model_shape(name)


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"model.path.*no config.json.*Qwen/Qwen2.5-7B"):
        model_shape("/models/nothing-like-it")


@pytest.mark.parametrize("replicas", (1, 3, 8))
def test_the_optimizers_parts_of_all_ranks_are_the_parameters(replicas):
    parallel = ParallelConfig(tensor=2, pipeline=2)
    for stage in (0, 1):
        parameters = chunk_parameters(known_shape("Qwen/Qwen2.5-0.5B"), parallel, stage=stage)
        buffer = lay_out(parameters, replicas=replicas, distributed=True)
        assert buffer.numel % math.lcm(replicas, 128) == 0
        assert sum(buffer.owned(rank, replicas) for rank in range(replicas)) == sum(p.numel for p in parameters)


def test_stages_and_tensor_ranks_together_hold_the_model():
    shape = known_shape("Qwen/Qwen2.5-72B")
    parallel = ParallelConfig(tensor=8, pipeline=4, virtual_pipeline=5)
    held = sum(p.numel for s in range(4) for c in range(5) for p in chunk_parameters(shape, parallel, stage=s, chunk=c))
    replicated = shape.num_layers * 2 * shape.hidden_size + shape.hidden_size  # norms are whole on every tensor rank
    assert 8 * (held - replicated) + replicated == total_parameters(shape)  # 152064 needs no padding


def test_adam_and_master_weights_cost_twelve_bytes_shared_over_the_replicas():
    shape, parallel = known_shape("Qwen/Qwen2.5-7B"), ParallelConfig()
    found = state_bytes(shape, parallel, stage=0, replicas=8)
    assert found.parameters == pytest.approx(2 * 7_615_616_512, rel=1e-5)
    assert found.gradients == pytest.approx(4 * 7_615_616_512, rel=1e-5)
    assert found.optimizer == pytest.approx(12 * 7_615_616_512 / 8, rel=1e-5)
    assert state_bytes(shape, parallel, stage=0, replicas=8, trained=False).total == 2 * 7_615_616_512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor": 8}, "8 must divide the model's num_attention_heads = 28"),
        ({"pipeline": 3}, "must divide the model's 28 layers"),
    ],
)
def test_layouts_that_do_not_fit_the_model(options, message):
    with pytest.raises(ConfigError, match=message):
        chunk_parameters(known_shape("Qwen/Qwen2.5-7B"), ParallelConfig(**options), stage=0)
