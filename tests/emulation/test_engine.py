"""The engines of all GPU recipes as a real CUDA build of vLLM takes them, on 8 H100s that only say that they are there."""

import pytest
import transformers

from pmpo_megatron.hf.known_models import ROWS, known_config, model_shape
from pmpo_megatron.hf.tiny_model import make_tokenizer
from pmpo_megatron.planner.engine import PREFILL_TOKENS, engine_bytes
from pmpo_megatron.planner.hardware import HARDWARE
from tests.tiny_models import save_tiny_model
from tests.unit.test_recipes import EXAMPLES, RECIPES, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]  # the first test makes the environment
MATH, MIXTURE = "qwen2.5-math-7b/config.yaml", "qwen3-30b-a3b/config-8.yaml"
FP8 = ["rollout.quantization=fp8"]
QUANTIZED = {"quantization": "fp8_per_tensor", "quantizer": "OnlineQuantizationConfig"}  # weights, while they are loaded
VARIANTS = {  # by name: recipe, overrides, how the engine is started
    "fp8": (MATH, FP8, {}),
    "fp8 mixture": (MIXTURE, FP8, {}),
    "experts": (MIXTURE, ["rollout.expert_parallel=true"], {}),
    "routes": (MIXTURE, [], {"routes": True}),
    "in flight": (MATH, [], {"in_flight": True}),
    "eager": (MATH, ["rollout.enforce_eager=true"], {}),
    "share of the memory": (MATH, ["rollout.kv_cache_gib=null", "rollout.tensor_parallel=1"], {}),
}
CASES = {name: (name, [], {}) for name in RECIPES} | VARIANTS


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """By the path that recipes give, a directory with the published model's config.json: vLLM's configuration needs no more."""
    directory = tmp_path_factory.mktemp("models")
    for recipe in RECIPES:
        path = load(recipe).model.path
        [known] = [name for name in ROWS if name.split("/")[1] == path.split("/")[1]]
        values = known_config(known)
        kind = getattr(transformers, values["architectures"][0].replace("ForCausalLM", "Config"))
        kind(**values).save_pretrained(directory / path.split("/")[1])
    return {load(recipe).model.path: str(directory / load(recipe).model.path.split("/")[1]) for recipe in RECIPES}


@pytest.fixture(scope="module")
def made(machine, models):
    """By case, what vLLM's configuration says."""
    cases = {
        name: (str(EXAMPLES / recipe), overrides, models[load(recipe).model.path], how)
        for name, (recipe, overrides, how) in CASES.items()
    }
    return machine.call("tests.emulation.engine_worker:configurations", cases)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_vllm_takes_a_recipes_engine_as_it_is_meant(name, made):
    engine, config = made[name], load(name)
    rollout, shape = config.rollout, model_shape(config.model.path)
    planned = engine_bytes(shape, rollout, HARDWARE["h100-80gb"])
    assert engine == {
        "device": "cuda",
        "executor": "mp",
        "tensor_parallel": rollout.tensor_parallel,
        "expert_parallel": rollout.expert_parallel,
        "worker": "vllm.v1.worker.gpu_worker.Worker",
        "clashes": [],
        "new_runner": True,
        "async_scheduling": True,
        "batched_tokens": PREFILL_TOKENS,
        "requests": rollout.max_num_seqs,
        "longest": rollout.max_model_len,
        "kv_cache_bytes": int(rollout.kv_cache_gib * 2**30),
        "kv_bytes_per_token": planned.kv_per_token,
        "utilization": rollout.gpu_memory_utilization,
        "prefix_caching": True,
        "log_probs": "processed_logprobs",
        "dtype": "torch.bfloat16",
        "quantization": None,
        "quantizer": "NoneType",
        "sleep": rollout.sleep != "none",
        "allocator": True,
        "graphs": "FULL_AND_PIECEWISE",
        "routes": False,
    }


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("fp8", QUANTIZED),
        ("fp8 mixture", QUANTIZED),
        ("experts", {"expert_parallel": True}),
        ("routes", {"routes": True}),
        ("in flight", {"async_scheduling": False}),
        ("eager", {"graphs": "NONE"}),
    ],
)
def test_a_setting_changes_what_it_says_and_nothing_else(variant, changed, made):
    base = made[VARIANTS[variant][0]]
    assert {name: value for name, value in made[variant].items() if value != base[name]} == changed


def test_without_a_size_the_cache_gets_the_share_of_the_memory_that_is_left(made):
    engine = made["share of the memory"]
    assert engine["kv_cache_bytes"] is None and engine["utilization"] == load(MATH).rollout.gpu_memory_utilization


def test_what_engines_are_forked_from_does_not_initialise_cuda(machine):
    """Once a process has, what it forks cannot: no engine would start."""
    [told] = machine.call("tests.emulation.engine_worker:forks")
    assert told["engine"] == {"vllm": True, "initialisations": 0, "initialised": False, "bad_fork": False}
    assert told["gpus"] == "2,3,4,5,6,7,0,1"


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_an_engine_starts_up_to_the_gpu_that_is_not_there(tensor_parallel, machine, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(save_tiny_model("qwen2", tmp_path / "model", vocab_size=len(tokenizer)))
    [told] = machine.call("tests.emulation.engine_worker:start", str(tmp_path / "model"), tensor_parallel)
    assert told.startswith("the rollout engine did not start") and "init_device" in told, told
    assert "Found no NVIDIA driver on your system" in told, told
