"""Models of Transformer Engine's layers, whose compiled part is not here: built, loaded and stored, not run."""

import numpy as np
import pytest

from tests.tiny_models import KINDS, save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]  # the first test makes the environment
MIXTURES = [kind for kind in KINDS if "moe" in kind or kind == "mixtral"]
LAYOUTS = {  # by name: processes, layout, which models
    "single": (1, {}, [*KINDS]),
    "tp2": (2, dict(tensor=2, sequence_parallel=True), ["qwen2", "llama3-tied", "qwen3-moe-mixed", "qwen2-moe"]),
    "pp2": (2, dict(pipeline=2, virtual_pipeline=2), ["qwen3-tied", "qwen3-moe-mixed"]),
    "ep2": (2, dict(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1), MIXTURES),
}
CASES = [(name, kind) for name, (_, _, kinds) in LAYOUTS.items() for kind in kinds]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return {kind: str(save_tiny_model(kind, directory / kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def built(machine, checkpoints, tmp_path_factory):
    """Of a layout, what every rank says of each model."""
    made = {}

    def build(name):
        if name not in made:
            ranks, layout, kinds = LAYOUTS[name]
            arguments = str(machine.transformer_engine), {kind: checkpoints[kind] for kind in kinds}, layout
            out = str(tmp_path_factory.mktemp(name))
            made[name] = machine.call("tests.emulation.model_worker:policies", *arguments, out, ranks=ranks)
        return made[name]

    return build


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_both_kinds_of_layers_hold_the_same_weights_under_the_same_keys(layout, kind, built):
    for rank in built(layout):
        fused, own = rank[kind]["transformer_engine"], rank[kind]["local"]
        assert "TELayerNormColumnParallelLinear" in fused["layers"] and not any(name.startswith("TE") for name in own["layers"])
        assert fused["marks"] == own["marks"]
        assert fused["stored"] == own["stored"]
        for values in (fused["values"], fused["read by the others"], own["read by the others"]):
            assert values.keys() == own["values"].keys()
            for name, expected in own["values"].items():
                np.testing.assert_array_equal(values[name], expected, err_msg=name)


def test_a_mixtures_experts_are_one_grouped_product(built):
    [rank] = built("single")
    assert all("TEColumnParallelGroupedLinear" in rank[kind]["transformer_engine"]["layers"] for kind in MIXTURES)


DENSE = [{}, dict(tensor=4), dict(tensor=2, context=2), dict(tensor=2, pipeline=2, virtual_pipeline=2), dict(pipeline=4)]
SPREAD = [dict(expert=8), dict(tensor=4, expert=8, expert_tensor=1), dict(tensor=4, pipeline=2, expert=8, expert_tensor=1)]


@pytest.mark.parametrize(("model", "layouts"), [("Qwen/Qwen2.5-32B", DENSE), ("Qwen/Qwen3-30B-A3B", SPREAD)])
def test_megatron_takes_every_layout_with_every_recomputation(model, layouts, machine):
    layouts = [layout | ({"sequence_parallel": True} if "tensor" in layout else {}) for layout in layouts]
    assert machine.call(
        "tests.emulation.model_worker:transformer_configs", str(machine.transformer_engine), model, layouts
    ) == [[]]
