"""Numbers on a real GPU: bf16 and float32 against transformers and float64, Transformer Engine against our layers."""

import importlib.util

import numpy as np
import pytest
import torch

from pmpo_megatron.algo.objective import PRESETS, evaluate_objective
from pmpo_megatron.model import layers
from pmpo_megatron.model.log_probs import token_log_probs
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_model
from tests.unit.algo.test_objective import make_batch


def check_log_probs(found: np.ndarray, path: str, tolerance: float) -> None:
    """Of the first trajectory, against transformers on the CPU."""
    import transformers

    from tests.distributed.parity_worker import TEMPERATURE, micro_batches

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batch = micro_batches(1, 0, 0)[0]
    with torch.no_grad():
        logits = model(batch.tokens_T[None, : batch.boundaries[1]]).logits[0] / TEMPERATURE
    expected = torch.log_softmax(logits, -1).gather(1, batch.targets_T[: len(logits), None])[:, 0].numpy()
    response = (batch.trajectory_T[: len(logits)] == 0).numpy()
    np.testing.assert_allclose(found[: len(logits)][response], expected[response], atol=tolerance)


@pytest.mark.parametrize("layers", ["single", "own_layers"])
def test_log_probs_are_those_of_transformers(layers, path, request):
    runs = request.getfixturevalue(layers)
    for dtype, tolerance in (("float32", 2e-3), ("bfloat16", 0.2)):  # float32 products may use TF32
        check_log_probs(runs[dtype]["log_probs"], path, tolerance)


@pytest.mark.parametrize("worker", ["train", "train_own_layers"])
@pytest.mark.parametrize("kind", ["qwen3-moe-mixed", "qwen2-moe"])
def test_log_probs_of_a_mixture_of_experts_are_those_of_transformers(worker, kind, tmp_path):
    sizes = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=128)
    heads = {"head_dim": 64} if kind.startswith("qwen3") else {}
    path = str(save_tiny_model(kind, tmp_path / "model", **sizes, **heads))
    [found] = run_ranks(1, f"tests.gpu.gpu_worker:{worker}", path, {}, "float32", gpu=True)
    check_log_probs(found["log_probs"], path, 2e-3)
    assert found["applied"]


@pytest.mark.parametrize("layers", ["single", "own_layers"])
def test_the_first_step_is_on_policy_in_bf16(layers, request):
    found = request.getfixturevalue(layers)["bfloat16"]
    assert found["applied"] and (found["first"]["power_mean"] == 1.0).all() and (found["first"]["p"] == 1.0).all()
    assert found["dtypes"] == ["torch.bfloat16"] and found["main_gradients"] == ["torch.float32"]


def test_transformer_engine_is_used_where_it_is(single, own_layers):
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    assert single["float32"]["transformer_engine"] and not own_layers["float32"]["transformer_engine"]
    for quantity in ("losses", "norms"):
        assert single["float32"][quantity] == pytest.approx(own_layers["float32"][quantity], rel=2e-2, abs=5e-4)


@pytest.mark.parametrize("grouped", [1, 4])
def test_the_last_queries_of_a_span_in_bf16(grouped):
    """`causal_lower_right` on flash attention, with grouped queries, against softmax in float64; gradients, too."""
    torch.manual_seed(0)
    q = torch.randn(1, 2 * grouped, 96, 64).bfloat16().cuda().requires_grad_()
    k, v = (torch.randn(1, 2, 224, 64).bfloat16().cuda().requires_grad_() for _ in range(2))
    attention = layers.CoreAttention.__new__(layers.CoreAttention)
    torch.nn.Module.__init__(attention)
    attention.scale = 64**-0.5
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        [found] = attention._attend_span(q, k, v)
    wide = [x.double() for x in (q, k.repeat_interleave(grouped, 1), v.repeat_interleave(grouped, 1))]
    scores = wide[0] @ wide[1].transpose(-1, -2) / 8 + layers._causal_mask(96, 224, wide[0])
    expected = scores.softmax(-1) @ wide[2]
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(expected)
    gradients, wanted = (torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, expected))
    for mine, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine.double(), right.double(), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_objective_never_waits_for_the_gpu(name):
    """Value and gradient as on the CPU, and no operation that makes the host wait."""
    log_probs, old, trajectory, advantages, weights = make_batch(3, std=0.5, outlier=9.0)
    on_cpu = evaluate_objective(log_probs, old, trajectory, advantages, weights, PRESETS[name], progress=0.3)
    expected = torch.autograd.grad(on_cpu.surrogate, log_probs)[0]
    moved = [x.detach().cuda() for x in (log_probs, old, trajectory, advantages, weights)]
    moved[0].requires_grad_()
    evaluate_objective(*moved, PRESETS[name], progress=0.3)  # tables of constants are made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = evaluate_objective(*moved, PRESETS[name], progress=0.3)
        [gradient] = torch.autograd.grad(out.surrogate, moved[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.p_N.cpu(), on_cpu.p_N, rtol=0, atol=1e-8)
    torch.testing.assert_close(out.loss.cpu(), on_cpu.loss, rtol=1e-9, atol=1e-9)


def test_bf16_log_probs_accumulate_in_float32():
    """Against float64 products of the same bf16 operands: the GPU's own path to float32 results."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=generator).bfloat16() for n in (37, 1000))
    targets = torch.randint(0, 990, (37,), generator=generator)
    table = (hidden.double() @ weight[:990].double().t() / 16).log_softmax(-1)
    expected = table.gather(1, targets[:, None])[:, 0]
    hidden, weight = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()
    found, entropy = token_log_probs(hidden, weight, targets.cuda(), vocab_size=990, temperature=16.0, chunk_tokens=16)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double().cpu(), -(table.exp() * table).sum(-1), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    onehot = torch.nn.functional.one_hot(targets, 990).double()
    wanted = (onehot - table.exp()) @ weight[:990].detach().double().cpu() / 16
    torch.testing.assert_close(hidden.grad.double().cpu(), wanted, rtol=2e-2, atol=2e-2)
