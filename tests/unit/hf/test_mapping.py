"""The mapping against Hugging Face's own modules, its inverse, and damaged checkpoints."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from pmpo_megatron.errors import MappingError
from pmpo_megatron.hf.mapping import WeightMapping, global_name, local_name
from pmpo_megatron.hf.safetensors import SafetensorsReader, copy_side_files
from pmpo_megatron.hf.shape import read_shape, shape_of
from tests.weights import unshard

SIZES = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=5e5,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2_tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "llama": transformers.LlamaConfig(**SIZES),
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, head_dim=16, mlp_only_layers=[1], **EXPERTS),
    "qwen2_moe": transformers.Qwen2MoeConfig(**SIZES, shared_expert_intermediate_size=40, decoder_sparse_step=2, **EXPERTS),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    """(model, directory) of every architecture, random weights, saved by transformers in several shards."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory, max_shard_size="20KB")
    return model, directory


def test_shapes_are_those_that_transformers_writes(checkpoint):
    """In memory it holds a layer's experts in one tensor, in files each expert's own."""
    model, directory = checkpoint
    mapping, reader = WeightMapping(read_shape(directory)), SafetensorsReader(directory)
    assert mapping.hf_shapes == {name: tuple(reader(name).shape) for name in reader.names}
    assert sum(reader(name).numel() for name in mapping.hf_shapes) == model.num_parameters()
    mapping.check_names(reader.names, where="here")


@pytest.mark.parametrize("size", [1, 2])
def test_merge_shard_unshard_split_is_the_identity(checkpoint, size):
    _, directory = checkpoint
    reader = SafetensorsReader(directory)
    for entry in WeightMapping(read_shape(directory)).entries:
        tensors = [reader(name) for name in entry.hf]
        whole = entry.merge(tensors)
        back = entry.split(unshard(entry, [entry.shard(whole, rank, size) for rank in range(size)]))
        for name, before, after in zip(entry.hf, tensors, back, strict=True):
            assert torch.equal(before, after), name


def test_qkv_rows_of_a_shard_belong_to_that_ranks_heads(checkpoint):
    """Rank 1 of 2 holds key-value head 1 and query heads 2 and 3, and nothing of the others."""
    _, directory = checkpoint
    shape, reader = read_shape(directory), SafetensorsReader(directory)
    entry = WeightMapping(shape).by_megatron["decoder.layers.1.self_attention.linear_qkv.weight"]
    q, k, v = (reader(f"model.layers.1.self_attn.{x}_proj.weight") for x in "qkv")
    d = shape.head_dim
    expected = torch.cat([q[2 * d : 4 * d], k[d : 2 * d], v[d : 2 * d]])
    assert torch.equal(entry.shard(entry.merge([reader(name) for name in entry.hf]), 1, 2), expected)


def test_rows_of_fc1_are_half_gate_and_half_up(checkpoint):
    _, directory = checkpoint
    shape, reader = read_shape(directory), SafetensorsReader(directory)
    for entry in WeightMapping(shape).entries:
        if entry.megatron.endswith("linear_fc1.weight"):
            gate, up = (reader(name) for name in entry.hf)
            found = entry.shard(entry.merge([gate, up]), 1, 2)
            assert torch.equal(found, torch.cat([gate.chunk(2)[1], up.chunk(2)[1]])), entry.megatron


def test_a_copy_of_the_side_files_and_the_tensors_is_what_transformers_reads(checkpoint, tmp_path):
    model, directory = checkpoint
    reader = SafetensorsReader(directory)
    save_file({name: reader(name) for name in reader.names}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    copy_side_files(directory, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, before), after in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after), name


def test_missing_extra_and_misshapen_tensors_are_named(checkpoint):
    _, directory = checkpoint
    mapping = WeightMapping(read_shape(directory))
    entry = [entry for entry in mapping.entries if entry.megatron.endswith("linear_fc2.weight")][-1]
    [name] = entry.hf
    names = [*mapping.hf_shapes, "model.layers.7.mlp.up_proj.weight"]
    names.remove(name)
    with pytest.raises(MappingError, match=rf"missing: {name}; not in the model: model.layers.7"):
        mapping.check_names(names, where="here")
    with pytest.raises(MappingError, match=rf"{name}: has shape \(3, 3\)"):
        entry.merge([torch.zeros(3, 3)])
    with pytest.raises(MappingError, match="no such parameter"):
        mapping.entry("decoder.layers.9.mlp.linear_fc2.weight")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*not supported; supported: LlamaForCausalLM"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": None}, "hidden_size.* is missing"),
    ],
)
def test_unsupported_configs_are_refused(change, words):
    config = CONFIGS["qwen2"].to_dict() | {"architectures": ["Qwen2ForCausalLM"], "rope_parameters": None} | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(MappingError, match=words):
        shape_of(config)


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("qwen3_moe", {"scoring_func": "sigmoid"}, 'scoring_func is "sigmoid"; only "softmax" is supported'),
        ("qwen3_moe", {"n_group": 4}, "n_group is 4; only routing without groups"),
        ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5; only 1.0"),
        ("qwen3_moe", {"kv_lora_rank": 512}, "kv_lora_rank is 512.*no MLA"),
        ("qwen3_moe", {"use_expert_bias": True}, "use_expert_bias is true"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias is true"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, and there are 4 experts"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok is 1 with norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, r"mlp_only_layers is \[2\]; it must be a list of layers from 0 to 1"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "leave no layer with experts"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size.* is missing"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias is false"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096; only full attention"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; only routing without noise"),
    ],
)
def test_mixtures_that_would_be_computed_otherwise_are_refused(kind, change, words):
    names = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "mixtral": "MixtralForCausalLM"}
    config = CONFIGS[kind].to_dict() | {"architectures": [names[kind]]} | change
    with pytest.raises(MappingError, match=words):
        shape_of({key: value for key, value in config.items() if value is not None})


def test_both_spellings_of_rope_are_read():
    old = dict(CONFIGS["llama"].to_dict(), architectures=["LlamaForCausalLM"], rope_theta=7e5, rope_parameters=None)
    old["rope_scaling"] = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    shape = shape_of(old)
    assert shape.rope_theta == 7e5 and shape.rope_scaling.original_max_position_embeddings == 64


def test_names():
    assert local_name("decoder.layers.3.mlp.linear_fc1.layer_norm_weight") == "decoder.layers.3.pre_mlp_layernorm.weight"
    assert global_name("decoder.layers.1.mlp.linear_fc1.weight", 4) == "decoder.layers.5.mlp.linear_fc1.weight"
    assert global_name("embedding.word_embeddings.weight", 4) == "embedding.word_embeddings.weight"
    assert global_name("decoder.layers.1.mlp.router.weight", 4, 8) == "decoder.layers.5.mlp.router.weight"
    expert = "decoder.layers.5.mlp.experts.local_experts.11.linear_fc2.weight"
    assert global_name("decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight", 4, 8) == expert
    assert global_name("decoder.layers.1.mlp.experts.linear_fc2.weight3", 4, 8) == expert, "Transformer Engine's name"


def test_directories_without_safetensors(tmp_path):
    with pytest.raises(MappingError, match="config.json: No such file"):
        read_shape(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MappingError, match="pickle files, which are not read by default"):
        SafetensorsReader(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(MappingError, match="model.safetensors: cannot be read as safetensors"):
        SafetensorsReader(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(MappingError, match="not a JSON object"):
        read_shape(tmp_path)
