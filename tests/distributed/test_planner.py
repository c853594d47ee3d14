"""The planner's bytes of parameters, gradients and optimizer states equal what Megatron allocates, on every rank."""

import pytest

from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.parameters import chunk_parameters, state_bytes, total_parameters
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_model

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "cp2": (2, {"context": 2}),
    "tp2": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2-dp2": (4, {"pipeline": 2}),
}
KINDS = ("qwen2-tied", "qwen2", "qwen3-tied", "llama3-tied")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [save_tiny_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_what_megatron_allocates(models, layout):
    world_size, options = LAYOUTS[layout]
    cases = [
        {"path": str(path), "dtype": dtype, "distributed": distributed}
        for path in models
        for dtype in ("float32", "bfloat16")
        for distributed in (True, False)
    ]
    parallel = ParallelConfig(**options)
    for measured in run_ranks(world_size, "tests.distributed.planner_worker:measure", options, cases):
        for case, found in zip(cases, measured, strict=True):
            shape = read_shape(case["path"])
            for chunk, real in enumerate(found["parameters_by_name"]):
                expected = chunk_parameters(shape, parallel, stage=found["stage"], chunk=chunk)
                assert [(p.name, p.numel) for p in expected] == real, case
            planned = state_bytes(
                shape,
                parallel,
                stage=found["stage"],
                replicas=found["replicas"],
                replica=found["replica"],
                dtype=case["dtype"],
                distributed=case["distributed"],
            )
            for what in ("parameters", "gradients", "optimizer"):
                assert found[what] == getattr(planned, what), (what, case)


def test_total_is_the_checkpoints(models):
    from safetensors import safe_open

    for path in models:
        with safe_open(path / "model.safetensors", "pt") as tensors:
            held = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
        assert total_parameters(read_shape(path)) == held
