"""A real vLLM on a GPU that it shares with the trainer: memory that it frees and takes again, and weights that it quantises."""

import pytest

from pmpo_megatron.hf.tiny_model import make_tokenizer
from tests.distributed.harness import run_ranks
from tests.integration.test_bridge import same
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Heads of 64, and a tokenizer."""
    pytest.importorskip("vllm")
    directory, tokenizer = tmp_path_factory.mktemp("engine") / "model", make_tokenizer()
    sizes = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512)
    save_tiny_model("qwen2", directory, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("mode", ["kv", "all"])
def test_an_engine_that_sleeps_frees_its_cache_and_answers_as_before(mode, model):
    [found] = run_ranks(1, "tests.gpu.gpu_worker:sleep_and_wake", model, mode, gpu=True, timeout=280)
    assert min(found["free"]) > 0.95, "the KV cache of 1 GiB"
    for later in found["answers"][1:]:
        same(later, found["answers"][0], tolerance=1e-2)  # bf16


def test_an_engine_in_fp8_quantises_every_update(model, tmp_path):
    [found] = run_ranks(1, "tests.gpu.gpu_worker:update_in_fp8", model, str(tmp_path), gpu=True, timeout=280)
    assert [ids for ids, _ in found["before"]] != [ids for ids, _ in found["after"]]
    same(found["after"], found["fresh"], tolerance=1e-2)
