"""Conversion in both directions: bit-exact, complete or absent, and clear about what is wrong."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from pmpo_megatron.convert import Options, hf_to_megatron, megatron_to_hf
from pmpo_megatron.convert.hugging_face import SafetensorsStream, SafetensorsWeights
from pmpo_megatron.convert.megatron import MegatronReader, MegatronWriter
from pmpo_megatron.convert.stored_names import places
from pmpo_megatron.errors import CheckpointError, MappingError
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.shape import read_shape
from tests.tiny_models import KINDS, save_tiny_model

ROOT = Path(__file__).parents[3]
VERIFY = Options(verify=True)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A tied Qwen2 in float32 with the files of a tokenizer beside it."""
    directory = save_tiny_model("qwen2-tied", tmp_path_factory.mktemp("hf"))
    (directory / "tokenizer.model").write_bytes(b"\x00sentencepiece\xff")
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def megatron(hf, tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "megatron"
    hf_to_megatron(hf, directory)
    return directory


def tensors(directory):
    weights = SafetensorsWeights(directory)
    return {name: weights(name) for name in weights.info}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def logits(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.arange(60)[None]).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_exact(kind, dtype, tmp_path):
    source = save_tiny_model(kind, tmp_path / "hf", dtype=dtype)
    original = tensors(source)
    there = hf_to_megatron(source, tmp_path / "megatron", VERIFY)
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", VERIFY, shard_bytes=40_000)
    assert there.tensors == back.tensors == len(original) and there.num_bytes == back.num_bytes
    assert_same_tensors(tensors(tmp_path / "back"), original)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and index["metadata"]["total_size"] == back.num_bytes
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert torch.equal(logits(tmp_path / "back"), logits(source))


def test_stacked_layers_of_a_model_with_experts_are_read(tmp_path, monkeypatch):
    """As megatron-core writes them where all layers have experts and moe_layer_freq is 1: [layers, experts, ...]."""
    source = save_tiny_model("qwen3-moe", tmp_path / "hf")
    monkeypatch.setattr("pmpo_megatron.convert.megatron.places", lambda *parameter: places(*parameter)[::-1])
    hf_to_megatron(source, tmp_path / "megatron")
    monkeypatch.undo()
    stored = MegatronReader(tmp_path / "megatron", read_shape(source)).metadata.state_dict_metadata
    assert tuple(stored["decoder.layers.mlp.experts.experts.linear_fc1.weight"].size) == (4, 8, 48, 32)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", VERIFY)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


def test_special_values_survive(tmp_path):
    source = save_tiny_model("llama", tmp_path / "hf", dtype="bfloat16")
    changed = tensors(source)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # every bit pattern
    weight = changed["model.embed_tokens.weight"]
    weight.view(-1)[:] = patterns[: weight.numel()] if weight.numel() < len(patterns) else 0
    stream = SafetensorsStream(source, [(n, t.dtype, t.shape) for n, t in changed.items()], shard_bytes=1 << 30)
    for name, tensor in changed.items():
        stream.add(name, tensor)
    stream.finish()
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tensors(tmp_path / "back"), changed)


class TestWhatIsWritten:
    def test_vocabulary_is_padded_inside_and_not_outside(self, hf, megatron, tmp_path):
        stored = MegatronReader(megatron, read_shape(hf)).metadata.state_dict_metadata
        assert tuple(stored["embedding.word_embeddings.weight"].size) == (256, 32)
        megatron_to_hf(megatron, tmp_path / "out")
        found = tensors(tmp_path / "out")
        assert tuple(found["model.embed_tokens.weight"].shape) == (250, 32) and "lm_head.weight" not in found

    def test_another_padding_is_accepted(self, hf, tmp_path):
        """Megatron pads to multiples of the tensor-parallel size, which need not divide 64."""
        mapping, weights = WeightMapping(read_shape(hf)), tensors(hf)
        writer = MegatronWriter(tmp_path, mapping.shape)
        for entry in mapping.entries:
            whole = entry.merge([weights[name] for name in entry.hf])
            if entry.megatron.startswith("embedding"):
                whole = torch.cat([whole, torch.full((128, 32), 7.0)])
            writer.add(entry.megatron, whole)
        writer.finish()
        megatron_to_hf(tmp_path, tmp_path.with_name("out"), hf=hf)
        assert_same_tensors(tensors(tmp_path.with_name("out")), weights)

    def test_tokenizer_and_configuration_travel(self, hf, megatron, tmp_path):
        megatron_to_hf(megatron, tmp_path / "out")
        for name in (
            "tokenizer.model",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
            "config.json",
        ):
            assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes(), name
        assert not list((megatron / "hf").glob("*.safetensors"))

    @pytest.mark.parametrize("direction", ["there", "back"])
    def test_dtype(self, hf, megatron, tmp_path, direction):
        half = Options(dtype="bfloat16", verify=True)
        if direction == "there":
            hf_to_megatron(hf, tmp_path / "megatron", half)
            megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
        else:
            megatron_to_hf(megatron, tmp_path / "out", half)
        assert_same_tensors(tensors(tmp_path / "out"), {n: t.to(torch.bfloat16) for n, t in tensors(hf).items()})
        assert read_shape(tmp_path / "out").dtype == "bfloat16"

    def test_a_tensor_larger_than_a_shard_gets_a_file(self, megatron, tmp_path):
        megatron_to_hf(megatron, tmp_path / "out", VERIFY, shard_bytes=1)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 50


class TestPickle:
    @pytest.fixture
    def pickled(self, hf, tmp_path):
        """The same checkpoint in two pickle files with an index."""
        directory = tmp_path / "pickled"
        directory.mkdir()
        (directory / "config.json").write_bytes((hf / "config.json").read_bytes())
        weights = tensors(hf)
        names = sorted(weights)
        parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, members in parts.items():
            torch.save({name: weights[name] for name in members}, directory / file)
        weight_map = {name: file for file, members in parts.items() for name in members}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    def test_refused_unless_asked_for(self, pickled, tmp_path):
        with pytest.raises(MappingError, match=r"pickle files only \(pytorch_model-00001-of-00002.bin.*--allow-pickle"):
            hf_to_megatron(pickled, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_read_when_asked_for(self, hf, pickled, tmp_path):
        hf_to_megatron(pickled, tmp_path / "out", VERIFY, allow_pickle=True)
        megatron_to_hf(tmp_path / "out", tmp_path / "back")
        assert_same_tensors(tensors(tmp_path / "back"), tensors(hf))

    def test_code_in_a_pickle_is_never_run(self, pickled, tmp_path):
        marker = tmp_path / "ran"
        torch.save({"model.norm.weight": Runs(marker)}, pickled / "pytorch_model-00002-of-00002.bin")
        with pytest.raises(MappingError, match="pytorch_model-00002-of-00002.bin: cannot be read"):
            hf_to_megatron(pickled, tmp_path / "out", allow_pickle=True)
        assert not marker.exists()

    @pytest.mark.parametrize("where", ["posix.system", "pathlib.os.system", "torch.os.system"])
    def test_code_in_a_checkpoints_index_is_never_run(self, megatron, tmp_path, where):
        marker, copy = tmp_path / "ran", tmp_path / "copy"
        shutil.copytree(megatron, copy)
        module, _, name = where.partition(".")
        words = [word.encode() for word in (module, name, f"touch {marker}")]
        one, other, command = (pickle.SHORT_BINUNICODE + bytes([len(word)]) + word for word in words)
        program = pickle.PROTO + b"\x04" + one + other + pickle.STACK_GLOBAL + command + pickle.TUPLE1 + pickle.REDUCE + b"."
        (copy / ".metadata").write_bytes(program)
        with pytest.raises(CheckpointError, match=f"copy/.metadata: damaged: it refers to {where}"):
            megatron_to_hf(copy, tmp_path / "out")
        assert not marker.exists()


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class TestDamage:
    @pytest.fixture
    def copy(self, hf, tmp_path):
        """A copy in three files, to be damaged."""
        hf_to_megatron(hf, tmp_path / "m")
        megatron_to_hf(tmp_path / "m", tmp_path / "copy", shard_bytes=60_000)
        return tmp_path / "copy"

    def fails(self, source, tmp_path, match):
        with pytest.raises((MappingError, CheckpointError), match=match):
            hf_to_megatron(source, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    def test_a_missing_tensor_is_named(self, copy, tmp_path):
        index = copy / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"]["model.layers.2.mlp.up_proj.weight"]
        index.write_text(json.dumps(content))
        self.fails(copy, tmp_path, "copy: .*missing: model.layers.2.mlp.up_proj.weight")

    def test_an_index_that_promises_too_much(self, copy, tmp_path):
        index = copy / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = content["weight_map"]["model.embed_tokens.weight"]
        index.write_text(json.dumps(content))
        self.fails(copy, tmp_path, "model-00001-of-00003.safetensors: tensor model.norm.weight is missing")

    def test_a_missing_file_is_named(self, copy, tmp_path):
        (copy / "model-00002-of-00003.safetensors").unlink()
        self.fails(copy, tmp_path, "model-00002-of-00003.safetensors: cannot be read")

    def test_a_file_cut_short_is_named(self, copy, tmp_path):
        with (copy / "model-00003-of-00003.safetensors").open("r+b") as file:
            file.truncate(20_000)
        self.fails(copy, tmp_path, "model-00003-of-00003.safetensors: cannot be read")

    def test_a_wrong_shape_is_named(self, copy, tmp_path):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
        self.fails(copy, tmp_path, r"mlp.gate_proj.weight has shape \(48, 32\); config.json says \(64, 32\)")

    def test_a_parameter_missing_in_megatrons_files_is_named(self, hf, tmp_path):
        mapping, weights = WeightMapping(read_shape(hf)), tensors(hf)
        writer = MegatronWriter(tmp_path, mapping.shape)
        for entry in mapping.entries:
            if entry.megatron not in ("decoder.final_layernorm.weight", "decoder.layers.3.mlp.linear_fc2.weight"):
                writer.add(entry.megatron, entry.merge([weights[name] for name in entry.hf]))
        writer.finish()
        with pytest.raises(CheckpointError, match="parameter decoder.final_layernorm.weight is missing"):
            megatron_to_hf(tmp_path, tmp_path.with_name("out"), hf=hf)
        with pytest.raises(CheckpointError, match="decoder.layers.3.mlp.linear_fc2.weight is incomplete"):
            MegatronReader(tmp_path, mapping.shape)(mapping.entry("decoder.layers.3.mlp.linear_fc2.weight"))

    def test_megatrons_file_cut_short_is_named(self, megatron, tmp_path):
        shutil.copytree(megatron, tmp_path / "copy")
        os.truncate(tmp_path / "copy" / "__0_0.distcp", 1000)
        with pytest.raises(CheckpointError, match="__0_0.distcp: has 1000 bytes instead of"):
            megatron_to_hf(tmp_path / "copy", tmp_path / "out")

    def test_another_models_configuration(self, megatron, tmp_path):
        other = save_tiny_model("qwen3", tmp_path / "other")
        with pytest.raises(CheckpointError, match="linear_qkv.weight has shape|q_layernorm.weight is missing"):
            megatron_to_hf(megatron, tmp_path / "out", hf=other)
        shallow = save_tiny_model("qwen2-tied", tmp_path / "shallow", num_hidden_layers=3)
        with pytest.raises(CheckpointError, match=r"has shape \(4, .*config.json says \(3, "):
            megatron_to_hf(megatron, tmp_path / "out", hf=shallow)

    def test_verification_finds_a_changed_tensor(self, hf, tmp_path, monkeypatch):
        """A writer that stores one number wrongly stands for a failing disk."""
        original = MegatronWriter.add

        def add(self, name, tensor):
            tensor = tensor.clone()
            tensor.view(-1)[-1] += name == "decoder.layers.2.mlp.linear_fc1.weight"
            original(self, name, tensor)

        monkeypatch.setattr(MegatronWriter, "add", add)
        hf_to_megatron(hf, tmp_path / "unseen")
        with pytest.raises(CheckpointError, match="model.layers.2.mlp.up_proj.weight reads back different"):
            hf_to_megatron(hf, tmp_path / "out", VERIFY)
        assert not (tmp_path / "out").exists()


class TestOutput:
    def test_refuses_what_exists(self, hf, megatron, tmp_path):
        (tmp_path / "config.json").write_text("mine")
        with pytest.raises(CheckpointError, match="exists; replace it with --force"):
            megatron_to_hf(megatron, tmp_path)
        assert (tmp_path / "config.json").read_text() == "mine"
        megatron_to_hf(megatron, tmp_path, Options(force=True))
        assert_same_tensors(tensors(tmp_path), tensors(hf))

    def test_force_replaces_checkpoints_only(self, megatron, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(CheckpointError, match="not a checkpoint, so --force does not replace it"):
            megatron_to_hf(megatron, tmp_path, Options(force=True))
        assert (tmp_path / "thesis.tex").read_text() == "mine"

    @pytest.mark.parametrize("place", [".", "hf", ".."])
    def test_never_writes_over_its_input(self, megatron, place):
        with pytest.raises(CheckpointError, match="overlaps"):
            megatron_to_hf(megatron, megatron / place, Options(force=True))

    def test_a_full_disk_is_seen_before_anything_is_written(self, hf, tmp_path, monkeypatch):
        from types import SimpleNamespace

        from pmpo_megatron.convert import output

        monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(CheckpointError, match="the disk has 0.0 GiB free"):
            hf_to_megatron(hf, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("direction", ["there", "back"])
    def test_a_failure_leaves_nothing_and_keeps_the_old(self, hf, megatron, tmp_path, monkeypatch, direction):
        convert, source, writer = DIRECTIONS[direction](hf, megatron)
        convert(source, tmp_path / "out")
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

        def add(self, *arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer, "add", add)
        with pytest.raises(CheckpointError, match="No space left on device"):
            convert(source, tmp_path / "out", Options(force=True))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before

    @pytest.mark.parametrize("direction", ["there", "back"])
    def test_a_kill_leaves_nothing_that_looks_complete(self, hf, megatron, tmp_path, direction):
        convert, source, writer = DIRECTIONS[direction](hf, megatron)
        program = f"""
import os, signal
from pathlib import Path
from {convert.__module__} import {convert.__name__} as convert
from {writer.__module__} import {writer.__name__} as Writer
finish = Writer.finish
def killed(self):
    finish(self)  # the latest moment: all tensors are written
    os.kill(os.getpid(), signal.SIGKILL)
Writer.finish = killed
convert(Path({str(source)!r}), Path({str(tmp_path / "out")!r}))
"""
        code = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=250).returncode
        assert code == -signal.SIGKILL and [path.name for path in tmp_path.iterdir()] == ["out.partial"]
        convert(source, tmp_path / "out", VERIFY)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


DIRECTIONS = {
    "there": lambda hf, megatron: (hf_to_megatron, hf, MegatronWriter),
    "back": lambda hf, megatron: (megatron_to_hf, megatron, SafetensorsStream),
}


class TestRunsCheckpoint:
    """A run's checkpoint as checkpoint/store.py lays it out; real ones are in tests/distributed/test_convert.py."""

    @pytest.fixture
    def run(self, megatron, tmp_path):
        from pmpo_megatron.checkpoint import files

        checkpoint = tmp_path / "run" / "checkpoints" / "round-00000003"
        shutil.copytree(megatron, checkpoint / "megatron")
        shutil.copytree(checkpoint / "megatron" / "hf", tmp_path / "base")
        for path in (checkpoint / "megatron" / "hf").iterdir():
            path.unlink()
        files.write_manifest(checkpoint, files.describe_files(checkpoint, files.data_files(checkpoint)))
        return checkpoint

    def test_configuration_comes_from_the_model_it_started_from(self, hf, run, tmp_path):
        with pytest.raises(CheckpointError, match="holds no hf/config.json; name .* with --hf"):
            megatron_to_hf(run, tmp_path / "out")
        megatron_to_hf(run, tmp_path / "out", VERIFY, hf=tmp_path / "base")
        assert_same_tensors(tensors(tmp_path / "out"), tensors(hf))

    def test_damage_is_found(self, run, tmp_path):
        data = run / "megatron" / "__0_0.distcp"
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        with pytest.raises(CheckpointError, match="__0_0.distcp is damaged"):
            megatron_to_hf(run, tmp_path / "out", VERIFY, hf=tmp_path / "base")
        os.truncate(data, 5000)
        with pytest.raises(CheckpointError, match="__0_0.distcp has 5000 bytes instead of"):
            megatron_to_hf(run, tmp_path / "out", hf=tmp_path / "base")

    def test_a_runs_directory_gets_a_hint(self, run, tmp_path):
        with pytest.raises(CheckpointError, match="its newest checkpoint is .*round-00000003"):
            megatron_to_hf(tmp_path / "run", tmp_path / "out")


def test_memory_holds_one_parameter(hf, tmp_path, monkeypatch):
    """While one parameter is converted, no tensor of the others is alive."""
    import weakref

    alive, peak = weakref.WeakSet(), [0]
    original = SafetensorsWeights.__call__

    def reading(self, name):
        tensor = original(self, name)
        alive.add(tensor)
        peak[0] = max(peak[0], len(alive))
        return tensor

    monkeypatch.setattr(SafetensorsWeights, "__call__", reading)
    hf_to_megatron(hf, tmp_path / "out")
    assert peak[0] <= 6  # q, k and v, and the parameter before them


def test_command_lines(hf, tmp_path):
    def tool(name, *arguments):
        command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=250)

    there = tool("convert_hf_to_megatron.py", "--hf", hf, "--out", tmp_path / "megatron", "--verify")
    assert there.returncode == 0 and "50 tensors" in there.stdout and "read again and equal" in there.stdout, there.stderr
    back = tool("convert_megatron_to_hf.py", "--checkpoint", tmp_path / "megatron", "--out", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert_same_tensors(tensors(tmp_path / "back"), tensors(hf))
    again = tool("convert_megatron_to_hf.py", "--checkpoint", tmp_path / "megatron", "--out", tmp_path / "back")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "--force" in again.stderr
    assert "Traceback" not in again.stderr


class TestDocumentedExamples:
    """docs/adding_an_architecture.md: the code there does what it says."""

    BLOCKS = (ROOT / "docs" / "adding_an_architecture.md").read_text().split("```python\n")[1:]

    def block(self, number):
        return self.BLOCKS[number].split("```")[0]

    def test_one_new_row_is_enough(self, tmp_path, monkeypatch):
        from pmpo_megatron.hf import shape

        monkeypatch.setattr(shape, "ARCHITECTURES", dict(shape.ARCHITECTURES))
        exec(self.block(0), vars(shape).copy())
        monkeypatch.setitem(KINDS, "mistral", ("MistralConfig", dict(sliding_window=None)))
        source = save_tiny_model("mistral", tmp_path / "hf")
        hf_to_megatron(source, tmp_path / "megatron", VERIFY)
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out", VERIFY)
        assert torch.equal(logits(tmp_path / "out"), logits(source))
        windowed = save_tiny_model("mistral", tmp_path / "windowed", sliding_window=64)
        with pytest.raises(MappingError, match="sliding_window is 64"):
            read_shape(windowed)

    def test_stacked_tensors(self, hf):
        from collections.abc import Sequence
        from dataclasses import dataclass

        from pmpo_megatron.hf.entries import Entry, QKVEntry

        shape, layer = read_shape(hf), 2
        usual = WeightMapping(shape).entry("decoder.layers.2.self_attention.linear_qkv.weight")
        queries, keys, hidden, ffn = 32, 16, shape.hidden_size, shape.ffn_hidden_size
        names = dict(dataclass=dataclass, Sequence=Sequence, torch=torch, Entry=Entry, QKVEntry=QKVEntry)
        names |= dict(shape=shape, layer=layer, queries=queries, keys=keys, hidden=hidden, ffn=ffn)
        # Not compiled with this file's annotations, so that the block stands alone.
        exec(compile(self.block(1), "block", "exec", dont_inherit=True), names)
        parts = [torch.randn(wanted) for wanted in usual.hf_shapes]
        merged = names["qkv"].merge([torch.cat(parts)])
        assert torch.equal(merged, usual.merge(parts))
        assert torch.equal(names["qkv"].split(merged)[0], torch.cat(parts))
        assert names["gate_up"].full_shape == WeightMapping(shape).entry("decoder.layers.2.mlp.linear_fc1.weight").full_shape
