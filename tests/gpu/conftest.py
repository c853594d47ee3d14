"""What only a GPU can show. Everything here skips, with a reason, where there is none."""

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_model


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """Heads of 64, which flash attention takes."""
    sizes = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512)
    return str(save_tiny_model("qwen2", tmp_path_factory.mktemp("model"), **sizes))


@pytest.fixture(scope="session")
def single(path):
    """By data type, what one GPU trains."""
    return {
        dtype: run_ranks(1, "tests.gpu.gpu_worker:train", path, {}, dtype, gpu=True)[0] for dtype in ("float32", "bfloat16")
    }


@pytest.fixture(scope="session")
def own_layers(path):
    """The same without Transformer Engine, if it is there at all."""
    worker = "tests.gpu.gpu_worker:train_own_layers"
    return {dtype: run_ranks(1, worker, path, {}, dtype, gpu=True)[0] for dtype in ("float32", "bfloat16")}
