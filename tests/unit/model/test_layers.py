"""Our core attention and norm against textbook formulas, in one process and with context shards put together by hand."""

import os
import socket
import weakref

import pytest
import torch
import torch.distributed as dist

from pmpo_megatron.parallel.shards import context_indices  # imports pmpo_megatron.parallel before Megatron

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU layers; tests/gpu has the GPU's")


@pytest.fixture(scope="module")
def layers():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    saved = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    dist.init_process_group("gloo")
    from pmpo_megatron.model import layers

    yield layers
    dist.destroy_process_group()
    for name, value in saved.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


class Config:
    kv_channels, params_dtype, sequence_parallel, use_cpu_initialization = 8, torch.float32, True, True


class ContextGroup:
    """Size and rank of a context-parallel group; the gather is done by the test."""

    def __init__(self, size, rank):
        self.size, self.rank = lambda: size, lambda: rank


class Groups:
    def __init__(self, cp):
        self.cp = cp


def attention_of(layers, size=1, rank=0):
    attention = layers.CoreAttention.__new__(layers.CoreAttention)
    torch.nn.Module.__init__(attention)
    attention.scale, attention.cp_group = Config.kv_channels**-0.5, ContextGroup(size, rank)
    return attention


def textbook(q, k, v, boundaries):
    """Causal softmax attention, one sequence and one query head at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = q[start:end, head].double() @ k[start:end, group].double().t() * Config.kv_channels**-0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            out[start:end, head] = scores.softmax(-1) @ v[start:end, group].double()
    return out.reshape(q.shape[0], -1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_packed_grouped_causal_attention(layers, size):
    lengths = [12, 24, 12]
    boundaries = tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(boundaries[-1], heads, 8, generator=generator) for heads in (4, 2, 2))
    expected = textbook(q, k, v, boundaries)
    for rank in range(size):
        mine = context_indices(boundaries, size=size, rank=rank)
        attention = attention_of(layers, size, rank)
        attention._gather = lambda key, value, order: (k.unsqueeze(1), v.unsqueeze(1))
        packed = layers.packed_sequences(boundaries, context_size=size, device=torch.device("cpu"))
        found = attention(q[mine], k[mine], v[mine], packed_seq_params=packed)
        torch.testing.assert_close(found.double(), expected[mine], rtol=1e-5, atol=1e-5)


def test_long_spans_go_in_blocks_of_queries(layers, monkeypatch):
    monkeypatch.setattr(layers, "QUERY_BLOCK", 3)
    test_packed_grouped_causal_attention(layers, 2)


@pytest.mark.parametrize("size", [2, 3])
def test_a_span_at_once_where_there_is_flash_attention(layers, monkeypatch, size):
    """Here PyTorch makes the mask of `causal_lower_right`; on a GPU the kernel aligns at the lower right (tests/gpu)."""
    monkeypatch.setattr(layers, "_has_flash_attention", lambda q: True)
    monkeypatch.setattr(layers, "_causal_mask", lambda *_: pytest.fail("an explicit mask"))
    test_packed_grouped_causal_attention(layers, size)


def test_no_mask_outlives_the_forward_pass_and_gradients_are_right(layers, monkeypatch):
    """Masks that autograd keeps would make memory grow with the square of a trajectory's length."""
    masks, make = [], layers._causal_mask

    def remembered(*arguments):
        masks.append(weakref.ref(mask := make(*arguments)))
        return mask

    monkeypatch.setattr(layers, "_causal_mask", remembered)
    monkeypatch.setattr(layers, "QUERY_BLOCK", 4)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(24, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    wanted = torch.randn(12, 32, generator=generator)
    mine = context_indices((0, 24), size=2, rank=0)
    attention = attention_of(layers, 2, 0)
    attention._gather = lambda key, value, order: (k.unsqueeze(1), v.unsqueeze(1))
    packed = layers.packed_sequences((0, 24), context_size=2, device=torch.device("cpu"))
    found = attention(q[mine], k[mine], v[mine], packed_seq_params=packed)
    assert len(masks) > 1 and all(mask() is None for mask in masks)
    grads = torch.autograd.grad((found * wanted).sum(), (q, k, v))
    expected = torch.autograd.grad((textbook(q, k, v, (0, 24))[mine] * wanted).sum(), (q, k, v))
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5)


def test_neighbours_in_the_packing_do_not_leak(layers):
    boundaries, generator = (0, 6, 14), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(14, 2, 8, generator=generator) for _ in range(3))
    packed = layers.packed_sequences(boundaries, context_size=1, device=torch.device("cpu"))
    before = attention_of(layers)(q, k, v, packed_seq_params=packed)
    k[:6], v[:6] = 100.0, -100.0
    after = attention_of(layers)(q, k, v, packed_seq_params=packed)
    assert torch.equal(before[6:], after[6:]) and not torch.equal(before[:6], after[:6])


def test_rms_norm(layers):
    norm = layers.RMSNorm(Config, 16, eps=1e-3)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(5, 1, 16)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert norm.weight.sequence_parallel, "or its gradient is not summed over the sequence-parallel ranks"
