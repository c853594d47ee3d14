"""The CPU support reaches Megatron's modules and nobody else's torch."""

import subprocess
import sys

import pytest
import torch

import pmpo_megatron.parallel  # noqa: F401
from pmpo_megatron.parallel import megatron_on_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="inert where CUDA is available")


def test_only_megatron_sees_the_proxy():
    from megatron.core.transformer import transformer_layer

    assert transformer_layer.torch is not torch
    assert transformer_layer.torch.cuda.current_device() == torch.device("cpu")
    assert transformer_layer.torch.nn is torch.nn, "all else is the real module's"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


def test_factories_devices_and_type_names():
    from megatron.core.optimizer import clip_grads

    proxy = clip_grads.torch
    assert proxy.zeros(2, device="cuda").device.type == "cpu"
    assert proxy.device("cuda", 0) == torch.device("cpu") and isinstance(torch.device("cpu"), proxy.device)
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor" and torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).type() != "torch.cuda.HalfTensor"


def test_modules_imported_before_are_scoped_too_and_install_is_idempotent():
    program = (
        "import megatron.core.tensor_parallel.layers as layers\n"
        "import pmpo_megatron.parallel.megatron_on_cpu as m, torch\n"
        "assert layers.torch is not torch and m.install() and torch.zeros(1).cuda().device.type == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=250)


def test_inert_with_cuda(monkeypatch):
    monkeypatch.setattr(megatron_on_cpu, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = list(sys.meta_path)
    assert megatron_on_cpu.install() is False and sys.meta_path == before
