"""The policy on real GPUs: bf16 and float32 against transformers, NCCL layouts against one GPU, log-probs' memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
WORKER = "tests.gpu.gpu_worker:train"
PAIRS = {
    "tp2-sp": dict(tensor=2, sequence_parallel=True),
    "pp2": dict(pipeline=2),
    "cp2": dict(context=2),
    "dp2": {},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Heads of 64, which flash attention takes."""
    sizes = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512)
    return str(save_tiny_model("qwen2", tmp_path_factory.mktemp("model"), **sizes))


@pytest.fixture(scope="module")
def single(path):
    return {dtype: run_ranks(1, WORKER, path, {}, dtype)[0] for dtype in ("float32", "bfloat16")}


def test_log_probs_are_those_of_transformers(single, path):
    import transformers

    from tests.distributed.parity_worker import TEMPERATURE, micro_batches

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batch = micro_batches(1, 0, 0)[0]
    with torch.no_grad():
        logits = model(batch.tokens_T[None, : int(batch.cu_seqlens[1])]).logits[0] / TEMPERATURE
    expected = torch.log_softmax(logits, -1).gather(1, batch.targets_T[: len(logits), None])[:, 0].numpy()
    response = (batch.trajectory_T[: len(logits)] == 0).numpy()
    for dtype, tolerance in (("float32", 2e-3), ("bfloat16", 0.2)):  # float32 products may use TF32
        found = single[dtype]["log_probs"][: len(logits)]
        np.testing.assert_allclose(found[response], expected[response], atol=tolerance)


def test_the_first_step_is_on_policy_in_bf16(single):
    found = single["bfloat16"]
    assert found["applied"] and (found["first"]["power_mean"] == 1.0).all() and (found["first"]["p"] == 1.0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", PAIRS)
def test_two_gpus_train_as_one(single, path, name):
    found = run_ranks(2, WORKER, path, PAIRS[name], "float32")[0]
    assert found["losses"] == pytest.approx(single["float32"]["losses"], rel=5e-3, abs=5e-4)
    assert found["norms"] == pytest.approx(single["float32"]["norms"], rel=2e-2)


def test_log_probs_take_an_eighth_of_the_memory_of_whole_logits():
    command = [sys.executable, str(ROOT / "tools/bench/log_probs.py"), "--device", "cuda", "--chunks", "256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = [line.split() for line in done.stdout.splitlines() if line.startswith("chunk 256")]
    assert float(row[-2].rstrip("x")) <= 1 / 8, done.stdout
