"""Chunked log-probs and entropies against log_softmax in float64, values and gradients."""

import pytest
import torch

from pmpo_megatron.model import log_probs as module
from pmpo_megatron.model.log_probs import token_log_probs
from tests.tolerances import assert_near

VOCAB, ROWS, HIDDEN, TOKENS = 37, 40, 12, 23  # 3 rows of padding


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden, weight, targets, torch.randn(2, TOKENS, generator=generator)


def reference(hidden, weight, targets, upstream, temperature):
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    table = (hidden @ weight[:VOCAB].t() / temperature).log_softmax(-1)
    log_probs, entropy = table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)
    (log_probs * upstream[0] + entropy * upstream[1]).sum().backward()
    return log_probs, entropy, hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_equals_log_softmax(chunk, temperature):
    hidden, weight, targets, upstream = inputs()
    expected = reference(hidden, weight, targets, upstream, temperature)
    found = token_log_probs(hidden, weight, targets, vocab_size=VOCAB, temperature=temperature, chunk_tokens=chunk)
    (found[0] * upstream[0] + found[1] * upstream[1]).sum().backward()
    logits = hidden @ weight[:VOCAB].t() / temperature  # their spacing is what log-probs are known to, however small those are
    for mine, wanted in zip(found, expected[:2], strict=True):
        assert_near(mine, wanted, spacings=4, relative=5e-7, of=logits)
    for mine, wanted in zip((hidden.grad, weight.grad), expected[2:], strict=True):
        assert_near(mine, wanted, spacings=4, relative=4e-6)
    assert weight.grad[VOCAB:].abs().max() == 0, "padding gets no gradient"


def test_one_of_the_two_gradients_may_be_absent():
    for used in (0, 1):
        hidden, weight, targets, upstream = inputs()
        upstream[1 - used] = 0
        expected = reference(hidden, weight, targets, upstream, 1.0)
        found = token_log_probs(hidden, weight, targets, vocab_size=VOCAB, chunk_tokens=6)
        (found[used] * upstream[used]).sum().backward()
        torch.testing.assert_close(hidden.grad.double(), expected[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weight.grad.double(), expected[3], rtol=1e-5, atol=1e-5)


def test_log_probs_without_entropies_have_the_same_bits():
    """What scoring and an optimizer step compute: values and gradients."""
    found = []
    for entropy in (True, False):
        hidden, weight, targets, upstream = inputs()
        log_probs, other = token_log_probs(hidden, weight, targets, vocab_size=VOCAB, chunk_tokens=6, entropy=entropy)
        (log_probs * upstream[0]).sum().backward()
        assert (other is not None) == entropy
        found.append((log_probs, hidden.grad, weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_padding_takes_no_part():
    hidden, weight, targets, _ = inputs()
    before = token_log_probs(hidden, weight, targets, vocab_size=VOCAB)[0]
    with torch.no_grad():
        weight[VOCAB:] = 50.0
    assert torch.equal(before, token_log_probs(hidden, weight, targets, vocab_size=VOCAB)[0])


def test_no_tokens():
    hidden, weight, targets, _ = inputs()
    log_probs, entropy = token_log_probs(hidden[:0], weight, targets[:0], vocab_size=VOCAB)
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,) and weight.grad.abs().max() == 0


def test_large_logits_do_not_overflow():
    hidden, weight, targets, _ = inputs()
    log_probs, entropy = token_log_probs(hidden * 1e3, weight, targets, vocab_size=VOCAB)
    assert log_probs.isfinite().all() and entropy.isfinite().all() and entropy.min() > -1e-2


def test_bfloat16_operands_give_float32_results():
    hidden, weight, targets, upstream = inputs(torch.bfloat16)
    expected = reference(hidden, weight, targets, upstream, 0.7)
    found = token_log_probs(hidden, weight, targets, vocab_size=VOCAB, temperature=0.7, chunk_tokens=6)
    (found[0] * upstream[0] + found[1] * upstream[1]).sum().backward()
    assert found[0].dtype == torch.float32 and weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), expected[2], rtol=2e-2, atol=2e-2)


def test_the_whole_logits_never_exist(monkeypatch):
    """The largest matrix that any product makes, forward and backward, is one chunk's."""
    hidden, weight, targets, _ = inputs()
    seen = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda a, b: seen.append(product(a, b)) or seen[-1])
    log_probs, _ = token_log_probs(hidden, weight, targets, vocab_size=VOCAB, chunk_tokens=4)
    log_probs.sum().backward()
    assert max(x.shape[0] for x in seen) == 4 and len(seen) == 6 * 3
