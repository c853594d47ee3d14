"""Rotary frequencies against transformers, and layouts that a model cannot be split into."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.known_models import known_shape
from pmpo_megatron.hf.shape import shape_of
from pmpo_megatron.model import architecture
from pmpo_megatron.model.architecture import check_layout, fused_layers, rotary_frequencies
from pmpo_megatron.parallel.state import ParallelConfig
from tests.tiny_models import COMMON, LLAMA3_SCALING


def shape(**changes):
    config = transformers.LlamaConfig(**(COMMON | changes))
    return config, shape_of(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("original, low, high", [(32, 1.0, 2.0), (8192, 1.0, 4.0), (16, 0.5, 8.0)])
def test_llama3_frequencies(original, low, high):
    scaling = LLAMA3_SCALING | dict(original_max_position_embeddings=original, low_freq_factor=low, high_freq_factor=high)
    config, ours = shape(rope_parameters=scaling, head_dim=64)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(rotary_frequencies(ours), expected, rtol=1e-6, atol=0)


def test_plain_frequencies():
    _, ours = shape(head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    torch.testing.assert_close(rotary_frequencies(ours), torch.tensor([1.0, 100**-0.25, 0.1, 100**-0.75]))


@pytest.mark.parametrize(
    "layout, message",
    [
        (dict(tensor=4), "parallel.tensor: 4 must divide the model's num_query_groups = 2"),
        (dict(tensor=3), "parallel.tensor: 3 must divide the model's num_attention_heads = 4"),
        (dict(pipeline=3), "parallel.pipeline: pipeline 3 \\* virtual_pipeline 1 = 3 must divide the model's 4 layers"),
        (dict(pipeline=2, virtual_pipeline=4), "virtual_pipeline 4 = 8 must divide the model's 4 layers"),
    ],
)
def test_layouts_that_do_not_fit_the_model(layout, message):
    with pytest.raises(ConfigError, match=message):
        check_layout(shape()[1], ParallelConfig(**layout))


MIXTURES = {
    "qwen3": known_shape("Qwen/Qwen3-30B-A3B"),  # 128 experts of width 768
    "qwen2": known_shape("Qwen/Qwen1.5-MoE-A2.7B"),  # 60 experts of width 1408, and a shared one of 5632
    "dense": known_shape("Qwen/Qwen3-4B"),
}
SP = dict(sequence_parallel=True)


@pytest.mark.parametrize(
    "model, layout, message",
    [
        ("qwen3", dict(expert=3), "parallel.expert: 3 must divide the model's 128 experts"),
        ("qwen3", dict(tensor=2), "parallel.sequence_parallel: must be true for a model with experts and tensor 2"),
        ("qwen2", dict(tensor=2, expert=2), "parallel.sequence_parallel: must be true"),
        ("dense", dict(expert=2), "parallel.expert: is for models with experts, and this one has none"),
        ("dense", dict(expert_tensor=1), "parallel.expert: is for models with experts, and this one has none"),
    ],
)
def test_layouts_that_experts_do_not_fit(model, layout, message):
    with pytest.raises(ConfigError, match=message):
        check_layout(MIXTURES[model], ParallelConfig(**layout))


def test_layouts_that_experts_fit():
    split = dict(tensor=4, **SP)
    for layout in (dict(expert=8), split, split | dict(expert=2), split | dict(expert=8, expert_tensor=1)):
        check_layout(MIXTURES["qwen3"], ParallelConfig(**layout))


def test_widths_that_do_not_divide_by_their_own_size():
    """The shared expert is cut like the rest of the model, routed experts over their own group."""
    narrow = replace(MIXTURES["qwen2"], experts=replace(MIXTURES["qwen2"].experts, shared_ffn_hidden_size=30))
    with pytest.raises(ConfigError, match="parallel.tensor: 4 must divide the width of the model's shared expert, 30"):
        check_layout(narrow, ParallelConfig(tensor=4, expert=2, expert_tensor=1, **SP))
    narrow = replace(MIXTURES["qwen2"], experts=replace(MIXTURES["qwen2"].experts, ffn_hidden_size=30))
    with pytest.raises(ConfigError, match="parallel.expert_tensor: 4 must divide the width of the model's experts, 30"):
        check_layout(narrow, ParallelConfig(tensor=4, expert=2, **SP))
    check_layout(narrow, ParallelConfig(tensor=4, expert=2, expert_tensor=1, **SP))


@pytest.mark.parametrize(
    "wanted, here, everywhere, message",
    [
        ("auto", True, [True, False, True], r"ranks \[1\] have no Transformer Engine and the others have"),
        ("transformer_engine", False, [False] * 3, "needs a GPU and the package"),
    ],
)
def test_ranks_that_differ_in_layers_are_refused(wanted, here, everywhere, message, monkeypatch):
    monkeypatch.setattr(architecture, "transformer_engine_available", lambda: here)
    monkeypatch.setattr(architecture, "gather_objects", lambda value, state: everywhere)
    with pytest.raises(ConfigError, match=f"^model.layers: .*{message}"):
        fused_layers(wanted, SimpleNamespace(world_size=3))


def test_local_layers_where_there_are_others(monkeypatch):
    monkeypatch.setattr(architecture, "transformer_engine_available", lambda: True)
    monkeypatch.setattr(architecture, "gather_objects", lambda value, state: [value] * 2)
    assert fused_layers("auto", SimpleNamespace(world_size=2))
    assert not fused_layers("local", SimpleNamespace(world_size=2))


@mock.patch.dict(sys.modules)  # nobody after this test sees the engine that it makes
def test_an_engine_that_does_not_import_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("")
    (tmp_path / "transformer_engine" / "pytorch.py").write_text("raise OSError('libcudnn.so.9: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"does not import \(libcudnn.so.9: no such file\)"):
        architecture.transformer_engine_available.__wrapped__()
