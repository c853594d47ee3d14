"""Bad data and bad model directories: the check before the start finds them, in one line with exit code 2."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmpo_megatron.commands.train import main
from pmpo_megatron.data.prompts import DataConfig, check_rows, load_prompts
from pmpo_megatron.errors import ConfigError, DataError, MappingError
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.safetensors import SafetensorsReader
from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.hf.tiny_model import make_tokenizer
from tests.tiny_models import save_tiny_model

GOOD = '{"problem": "1+1=", "answer": "2"}\n'
SETTINGS = ["data.max_prompt_tokens=16", "sampling.max_tokens=12", "batch.max_tokens_per_micro_batch=128", "run.device=cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A whole directory; `broken` copies it."""
    directory, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    save_tiny_model("qwen2", directory, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def broken(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


def check(capfd, tmp_path, model, source="arithmetic", *more):
    overrides = [f"model.path={model}", f"run.directory={tmp_path}/run", f"data.source={source}", *SETTINGS, *more]
    return main(["--dry-run", *overrides]), capfd.readouterr()


def test_a_whole_model_and_good_data_pass(capfd, tmp_path, model):
    (tmp_path / "p.jsonl").write_text(GOOD + json.dumps({"problem": "1" * 50, "answer": "1"}))
    code, output = check(capfd, tmp_path, model, tmp_path / "p.jsonl")
    assert code == 0 and "1 problems, 1 longer ones left out" in output.out and "51 tensors, by their headers" in output.out


BAD_LINES = {
    "": "no prompt is left",
    "\n\n": "no prompt is left",
    '{"problem": "\\u4f60\\u597d", "answer": "1"}': "p.jsonl:1: the tokenizer gives no token",
    GOOD + '{"problem": 3, "answer": "1"}': "p.jsonl:2: field 'problem' is a int",
    GOOD + '{"problem": "", "answer": "1"}': "p.jsonl:2: field 'problem' is empty",
    GOOD + '{"problem": "1", "answer": [[]]}': "p.jsonl:2: field 'answer'",
    GOOD + '{"problem": "1", "answer": NaN}': "p.jsonl:2: field 'answer'",
    json.dumps({"problem": "1" * 50, "answer": "1"}): "no prompt is left (1 too long)",
}


@pytest.mark.parametrize("section", ["data", "evaluation.data"])
@pytest.mark.parametrize("text", BAD_LINES)
def test_bad_rows_are_found_by_the_dry_run(capfd, tmp_path, model, text, section):
    (tmp_path / "p.jsonl").write_text(text)
    if section == "data":
        code, output = check(capfd, tmp_path, model, tmp_path / "p.jsonl")
    else:
        held_out = f"evaluation.data={{source: {tmp_path}/p.jsonl, max_prompt_tokens: 16}}"
        code, output = check(capfd, tmp_path, model, "arithmetic", held_out)
    assert code == 2 and output.err.startswith(f"error: {section}.source: ") and output.err.count("\n") == 1, output.err
    assert BAD_LINES[text] in output.err


def test_rows_are_checked_without_a_tokenizer_too(tmp_path):
    (tmp_path / "p.jsonl").write_text(GOOD + '{"problem": 3, "answer": "1"}')
    with pytest.raises(DataError, match="p.jsonl:2"):
        check_rows(DataConfig(source=str(tmp_path / "p.jsonl")))
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no problem"):
        check_rows(DataConfig(source=str(tmp_path / "p.jsonl")))


def test_a_tokenizer_of_another_model(capfd, tmp_path, broken):
    with pytest.raises(ConfigError, match="gives token .* but the model has only 5 tokens"):
        load_prompts(DataConfig(source="arithmetic"), make_tokenizer(), vocab_size=5)
    (broken / "tokenizer.json").write_text("{")
    code, output = check(capfd, tmp_path, broken)
    assert code == 2 and "tokenizer cannot be read" in output.err and output.err.count("\n") == 1, output.err
    for path in broken.glob("tokenizer*"):
        path.unlink()
    code, output = check(capfd, tmp_path, broken)
    assert code == 2 and "token" in output.err and output.err.count("\n") == 1, output.err


BAD_CONFIGS = [
    ("num_hidden_layers", 10**7),
    ("num_hidden_layers", "four"),
    ("num_hidden_layers", True),
    ("hidden_size", 0),
    ("hidden_size", "big"),
    ("hidden_size", -32),
    ("hidden_size", 32.5),
    ("hidden_size", None),
    ("num_attention_heads", 0),
    ("num_attention_heads", []),
    ("num_key_value_heads", 3),
    ("head_dim", 7),
    ("vocab_size", 10**12),
    ("intermediate_size", {}),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", float("nan")),
    ("max_position_embeddings", "many"),
    ("rope_parameters", [1]),
    ("rope_parameters", {"rope_theta": "x"}),
    ("rope_parameters", {"rope_type": "llama3"}),
    ("architectures", "Qwen2ForCausalLM"),
    ("architectures", [["Qwen2ForCausalLM"]]),
    ("architectures", 3),
    ("dtype", "int8"),
    ("dtype", {}),
    ("quantization_config", {"quant_method": "fp8"}),
]


@pytest.mark.parametrize("name, value", BAD_CONFIGS)
def test_bad_configs_are_one_line(capfd, tmp_path, broken, name, value):
    config = json.loads((broken / "config.json").read_text())
    if name == "dtype" and not value:
        value = {"a": 1}
    (broken / "config.json").write_text(json.dumps(config | {name: value}))
    code, output = check(capfd, tmp_path, broken)
    assert code == 2 and output.err.startswith("error: model.path: ") and output.err.count("\n") == 1, output.err
    assert "config.json" in output.err


def index(broken, file):
    names = list(load_file(broken / "model.safetensors"))
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/../../x", 3, "", "absent.safetensors", ["x"]])
def test_an_index_stays_in_its_directory(capfd, tmp_path, broken, file):
    shutil.copy(broken / "model.safetensors", tmp_path / "x.safetensors")
    index(broken, file)
    code, output = check(capfd, tmp_path, broken)
    assert code == 2 and output.err.startswith("error: model.path: ") and output.err.count("\n") == 1, output.err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\x00"])
def test_damaged_indices_are_named(broken, text):
    (broken / "model.safetensors.index.json").write_text(text)
    with pytest.raises(MappingError, match="index.json: damaged"):
        SafetensorsReader(broken)


@pytest.mark.parametrize("what", ["int8", "shape", "missing", "cut"])
def test_headers_are_checked_before_the_start(capfd, tmp_path, broken, what):
    path = broken / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    if what == "int8":
        tensors[name] = tensors[name].to(torch.int8)
    elif what == "shape":
        tensors[name] = tensors[name][:3].contiguous()
    elif what == "missing":
        del tensors[name]
    save_file(tensors, path)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    code, output = check(capfd, tmp_path, broken)
    assert code == 2 and output.err.startswith("error: model.path: ") and output.err.count("\n") == 1, output.err
    assert what == "cut" or name in output.err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_while_they_are_loaded(model, value):
    mapping, reader = WeightMapping(read_shape(model)), SafetensorsReader(model)

    def read(name):
        tensor = reader(name).clone()
        if name == "model.layers.1.self_attn.k_proj.weight":
            tensor[3, 5] = value
        return tensor

    parameters = [(entry.megatron, torch.empty(entry.full_shape)) for entry in mapping.entries]
    mapping.load(parameters, reader, lambda entry: (0, 1))
    with pytest.raises(MappingError, match="model.layers.1.self_attn.k_proj.weight.*NaN or inf"):
        mapping.load(parameters, read, lambda entry: (0, 1))
