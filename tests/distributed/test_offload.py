"""Memory that the trainer gives away while rollouts run comes back with the same bits."""

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_model

WORKER = "tests.distributed.offload_worker:train_in_every_mode"


@pytest.mark.parametrize(
    ("world_size", "layout", "dtype", "distributed"),
    [
        (1, {}, "float32", True),  # main parameters are views of the weights
        (2, {}, "bfloat16", True),
        pytest.param(1, {}, "bfloat16", False, marks=pytest.mark.slow),
        pytest.param(2, dict(pipeline=2, virtual_pipeline=2), "float32", True, marks=pytest.mark.slow),
        pytest.param(2, dict(tensor=2, sequence_parallel=True), "bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_three_rounds_have_the_same_bits_wherever_memory_was(world_size, layout, dtype, distributed, tmp_path):
    path = str(save_tiny_model("qwen2", tmp_path / "model"))
    arguments = (path, str(tmp_path / "checkpoints"), layout, dtype, distributed)
    found = run_ranks(world_size, WORKER, *arguments)[0]
    expected = found["never"]["weights"]
    for name, result in found.items():
        different = [key for key, value in result["weights"].items() if not torch.equal(value, expected[key])]
        assert result["weights"].keys() == expected.keys() and not different, (name, different[:4])
    left = {name: {kind for kind, size in result["bytes"].items() if size} for name, result in found.items()}
    assert left["none"] == {"weights", "states", "reference"}, "gradients cost nothing to free"
    assert left["optimizer"] == {"weights", "reference"} and left["all"] == left["resumed"] == set()
