"""Converted checkpoints on real layouts, and the export of what a run saved."""

import pickle

import pytest
import torch

from pmpo_megatron.convert import Options, hf_to_megatron, megatron_to_hf
from pmpo_megatron.convert.hugging_face import SafetensorsWeights
from pmpo_megatron.convert.megatron import MODEL_PARTS
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.shape import read_shape
from tests.distributed.harness import run_ranks
from tests.distributed.parity_worker import whole_batch
from tests.distributed.test_parity import score_with
from tests.tiny_models import save_tiny_model

KINDS = ("qwen2-tied", "qwen3", "llama")
PAIR = {"tp2": dict(tensor=2), "pp2": dict(pipeline=2), "pp2-interleaved": dict(pipeline=2, virtual_pipeline=2)}
MIXTURES = ("qwen2-moe", "qwen3-moe-mixed")
SPREAD = {"ep2": dict(expert=2), "tp2-ep2": dict(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1)}
CASES = [(kind, layout) for kinds, layouts in ((KINDS, PAIR), (MIXTURES, SPREAD)) for kind in kinds for layout in layouts]
SAVED = {"tp2": dict(tensor=2), "pp2-interleaved": dict(pipeline=2, virtual_pipeline=2)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{kind: (Hugging Face directory, another one of the same shape with other weights, converted checkpoint)}."""
    found = {}
    for kind in KINDS + MIXTURES:
        root = tmp_path_factory.mktemp(kind)
        hf, other = save_tiny_model(kind, root / "hf"), save_tiny_model(kind, root / "other")
        spoil(other / "model.safetensors")
        hf_to_megatron(hf, root / "megatron")
        found[kind] = hf, other, root / "megatron"
    return found


def spoil(path):
    """Other weights of the same shapes: what is not loaded afterwards is seen."""
    from safetensors.torch import load_file, save_file

    save_file({name: tensor + 1.0 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def loaded(models):
    """{layout: what each rank has there}."""
    found = {}
    for kinds, layouts in ((KINDS, PAIR), (MIXTURES, SPREAD)):
        cases = [(kind, *map(str, models[kind][1:])) for kind in kinds]
        ranks = run_ranks(2, "tests.distributed.convert_worker:load_layouts", list(layouts.values()), cases)
        found |= {layout: [rank[number] for rank in ranks] for number, layout in enumerate(layouts)}
    return found


@pytest.mark.parametrize("kind, layout", CASES)
class TestLoadingOnLayouts:
    def test_weights_are_the_models_own(self, models, loaded, layout, kind):
        mapping, weights = WeightMapping(read_shape(models[kind][0])), SafetensorsWeights(models[kind][0])
        seen = set()
        for results in loaded[layout]:
            for name, shard in results[kind][0].items():
                entry = mapping.entry(name)
                whole = entry.merge([weights(tensor) for tensor in entry.hf])
                assert torch.equal(shard, entry.shard(whole, *results["pieces"][entry.expert is not None])), name
                seen |= set(entry.hf)
        assert seen == set(mapping.hf_shapes)

    def test_log_probs_are_those_of_transformers(self, models, loaded, layout, kind):
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(models[kind][0], dtype=torch.float32)
        expected = score_with(model, whole_batch())[0]
        found = [results[kind][1] for results in loaded[layout]]
        assert sum(scores is not None for scores in found) == (1 if layout.startswith("pp2") else 2)
        for scores in (scores for scores in found if scores is not None):
            assert expected.abs().max() > 1 and (scores - expected).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """(directory with a run's checkpoint for each layout, {layout: weights that the run had})."""
    root = tmp_path_factory.mktemp("runs")
    return root, run_ranks(
        2, "tests.distributed.convert_worker:train_and_save", str(models["qwen2-tied"][0]), str(root), SAVED
    )[0]


def test_export_of_a_run_whose_experts_are_spread(models, tmp_path):
    hf, _, converted = models["qwen3-moe-mixed"]
    worker = "tests.distributed.convert_worker:train_and_save"
    [expected, _] = run_ranks(2, worker, str(hf), str(tmp_path / "run"), {"ep2": SPREAD["ep2"]})
    checkpoint = tmp_path / "run" / "ep2" / "round-00000001"
    megatron_to_hf(checkpoint, tmp_path / "out", Options(verify=True), hf=hf)
    weights = SafetensorsWeights(tmp_path / "out")
    assert set(weights.info) == set(expected["ep2"])
    assert all(torch.equal(weights(name), tensor) for name, tensor in expected["ep2"].items())
    assert contents(converted) == contents(checkpoint / "megatron")


@pytest.mark.parametrize("layout", SAVED)
class TestExportOfARun:
    def test_weights_are_what_the_run_had(self, models, saved, layout, tmp_path):
        hf, checkpoint = models["qwen2-tied"][0], saved[0] / layout / "round-00000001"
        megatron_to_hf(checkpoint, tmp_path / "out", Options(verify=True), hf=hf)
        weights, before, expected = SafetensorsWeights(tmp_path / "out"), SafetensorsWeights(hf), saved[1][layout]
        assert set(weights.info) == set(expected) == set(before.info)
        for name, tensor in expected.items():
            assert torch.equal(weights(name), tensor), name
            assert not torch.equal(weights(name), before(name)), f"{name}: not updated, so nothing is shown"

    def test_a_converted_checkpoint_has_the_same_names_and_shapes(self, models, saved, layout):
        assert contents(models["qwen2-tied"][2]) == contents(saved[0] / layout / "round-00000001" / "megatron")


def contents(directory):
    """{name: size, None for objects} of the model's part; the optimizer's names begin with "optimizer."."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    sizes = {name: getattr(value, "size", None) for name, value in metadata.state_dict_metadata.items()}
    return {name: size for name, size in sizes.items() if name.startswith(MODEL_PARTS)}


def test_loading_what_does_not_fit(models, tmp_path):
    deeper = save_tiny_model("qwen3", tmp_path / "deeper", num_hidden_layers=5)
    hf_to_megatron(deeper, tmp_path / "megatron")
    bad = [str(tmp_path / "megatron"), str(models["qwen2-tied"][2]), str(tmp_path / "absent")]
    [messages] = run_ranks(1, "tests.distributed.convert_worker:refusals", str(models["qwen3"][0]), bad)
    assert len(messages) == 3 and all(path in message for path, message in zip(bad, messages, strict=True))
