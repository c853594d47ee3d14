"""How several vLLMs share a batch and the GPUs; that they run is tested with real ones in tests/integration."""

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pmpo_megatron.config import build
from pmpo_megatron.errors import ConfigError, RolloutError
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.remote_process import own_nodes
from pmpo_megatron.rollout.vllm_child import whole_text
from pmpo_megatron.rollout.vllm_jobs import divide, make_jobs, missing_parts
from pmpo_megatron.rollout.vllm_settings import Launch, engine_settings, visible_gpus
from pmpo_megatron.types import Prompt


def make_parts(count: int, samples: int) -> list:
    sampling = SamplingConfig(samples_per_prompt=samples)
    prompts = [Prompt(10 * index, np.array([1, 2], np.int32), "", ()) for index in range(count)]
    return [(job, range(samples)) for job in make_jobs(prompts, sampling, 0, divided=True)]


@pytest.mark.parametrize("engines", [1, 2, 3, 8])
def test_prompts_go_to_engines_in_turn_with_all_their_responses(engines):
    parts = make_parts(5, 4)
    shares = divide(parts, engines)
    assert len(shares) == engines
    assert [shares[number % engines][number // engines] for number in range(5)] == parts, "each once"


def test_what_an_engine_leaves_is_asked_again_prompt_by_prompt():
    jobs = [job for job, _ in make_parts(5, 4)]
    answer = (np.array([5]), np.zeros(1), "", "stop", [(0, 1)], 0, None)
    jobs[2].take(f"{jobs[2].number}/1", *answer)  # came, and nobody has noted it
    names = [f"{jobs[which].number}/{sample}" for which, sample in ((4, 3), (2, 0), (0, 3), (2, 1), (3, 0))]
    known = {job.number: job for job in jobs if job is not jobs[3]}  # nobody waits for that one any more
    assert missing_parts(names, known) == [(jobs[0], [3]), (jobs[2], [0]), (jobs[4], [3])]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine": "server"}, "engine: HTTP servers are no longer used; instead pmpo-rollout-node"),
        ({"urls": ["http://a:1"]}, "urls: HTTP servers are no longer used"),
        ({"nodes": "own"}, "hosts: and key_file are needed with nodes 'own'"),
        ({"nodes": "own", "hosts": ["a:1"], "key_file": "k", "sleep": "kv"}, "sleep: kv has no effect: no vLLM shares a GPU"),
        ({"hosts": ["a:1"], "key_file": "k"}, "have no effect with any other"),
        ({"nodes": "own", "hosts": ["http://a:1"], "key_file": "k"}, "'http://a:1' is not HOST:PORT"),
    ],
)
def test_settings_of_nodes_that_cannot_be_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        build(RolloutConfig, values)


def test_a_key_that_others_could_know_is_refused(tmp_path):
    path = tmp_path / "key"
    config = RolloutConfig(nodes="own", hosts=("node7:7400", "node8:7401"), key_file=str(path))
    for content, mode, words in (
        (None, 0, "No such file"),
        (b"short", 0o600, "are no key"),
        (b"k" * 32, 0o644, "others can read"),
    ):
        if content is not None:
            path.write_bytes(content)
            path.chmod(mode)
        with pytest.raises(ConfigError, match=f"key_file: {path}: .*{words}"):
            own_nodes(config)
    path.chmod(0o600)
    assert [(node.host, node.port, node.key) for node in own_nodes(config)] == [
        ("node7", 7400, b"k" * 32),
        ("node8", 7401, b"k" * 32),
    ]
    assert "kkk" not in repr(own_nodes(config)), "keys do not get into messages"


def test_every_engine_has_gpus_of_its_own_first_and_sees_the_others(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    environments = [Launch({"tensor_parallel_size": 2}, "cuda", 3, number, 4).environment() for number in range(4)]
    assert environments[0] == {"OMP_NUM_THREADS": "3"}, "the first takes the first"
    assert environments[1] == {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "2,3,4,5,6,7,0,1"}
    assert visible_gpus(1, 2) == "2,3,4,5,6,7,0,1"
    assert visible_gpus(3, 2) == "6,7,0,1,2,3,4,5"
    with pytest.raises(RolloutError, match="engine 4 of the rollouts needs GPUs 8 to 9; here are 8"):
        visible_gpus(4, 2)
    assert Launch({"tensor_parallel_size": 2}, "cuda", None, 0, 4).environment() == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert visible_gpus(1, 1) == "GPU-b,GPU-a"


def test_a_mixture_says_its_routes_by_vllm_on_gpus_and_by_its_workers_on_cpu():
    config = RolloutConfig(tensor_parallel=2, expert_parallel=True)
    on_gpu = engine_settings(config, "model", "cuda", None, routes=True)
    assert on_gpu["enable_return_routed_experts"] and on_gpu["enable_expert_parallel"] and "enable_prefix_caching" not in on_gpu
    on_cpu = engine_settings(RolloutConfig(), "model", "cpu", None, routes=True)
    assert on_cpu["enable_prefix_caching"] is False and "enable_return_routed_experts" not in on_cpu
    assert "enable_expert_parallel" not in on_cpu


def test_memory_that_is_freed_needs_an_allocator_of_its_own_from_the_start():
    asked = [engine_settings(RolloutConfig(sleep=mode), "model", "cuda", None) for mode in ("none", "kv", "all")]
    assert [settings["enable_sleep_mode"] for settings in asked] == [False, True, True]


def test_fp8_is_what_vllm_makes_of_other_weights():
    """vLLM's own name "fp8" refuses them."""
    from vllm.config.quantization import _ONLINE_SHORTHANDS

    name = engine_settings(RolloutConfig(quantization="fp8"), "model", "cuda", None)["quantization"]
    assert name in _ONLINE_SHORTHANDS and "quantization" not in engine_settings(RolloutConfig(), "model", "cuda", None)


def test_text_made_at_the_end_is_what_is_made_token_by_token():
    """By the stream that vLLM's detokenizer uses, also where a response ends in the middle of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: number for number, letter in enumerate([*alphabet, "<|end|>"])}, [])
    raw = Tokenizer(model)
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    ids = [*tokenizer.encode(" né 日本 , x = 7 ."), tokenizer.eos_token_id]
    for end in range(1, len(ids) + 1):
        stream = decoders.DecodeStream(skip_special_tokens=True)
        parts = [stream.step(tokenizer._tokenizer, number) or "" for number in ids[:end]]
        assert whole_text(tokenizer, ids[:end]) == "".join(parts)
