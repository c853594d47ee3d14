"""The optimizer step beyond parity: exactly on-policy at first, repeatable bit by bit, and safe from NaN and inf."""

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_model

SINGLE = {"single": {}, "recompute": dict(recompute="full")}
PAIR = {
    "tp2-sp": dict(tensor=2, sequence_parallel=True),
    "pp2": dict(pipeline=2),
    "pp2-interleaved": dict(pipeline=2, virtual_pipeline=2),
    "cp2": dict(context=2),
    "dp2": {},
}
EXPERTS = {"ep2": dict(expert=2)}
NAMES = (*SINGLE, *PAIR, *EXPERTS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    dense, experts = (str(save_tiny_model(kind, tmp_path_factory.mktemp(kind))) for kind in ("qwen2", "qwen3-moe-mixed"))
    found = {}
    for world_size, layouts, path in ((1, SINGLE, dense), (2, PAIR, dense), (2, EXPERTS, experts)):
        ranks = run_ranks(world_size, "tests.distributed.step_worker:run_layouts", list(layouts.values()), path)
        found |= {name: [rank[i] for rank in ranks] for i, name in enumerate(layouts)}
    return found


@pytest.mark.parametrize("name", NAMES)
class TestStep:
    def test_the_first_step_is_exactly_on_policy(self, runs, name):
        """Old and new log-probs are the same bits: every ratio is 1, nothing is clipped, p is 1."""
        first, second = runs[name][0]["twice"][0][0]
        assert (first.trajectories["power_mean"] == 1.0).all() and (first.trajectories["p"] == 1.0).all()
        assert (first.trajectories["ess"] == first.trajectories["length"]).all()
        assert (second.trajectories["power_mean"] != 1.0).all(), "the first step changed the policy"

    def test_the_same_step_gives_the_same_bits(self, runs, name):
        for rank in runs[name]:
            (results, weights), (other_results, other_weights) = rank["twice"]
            assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
            assert [(r.loss, r.grad_norm) for r in results] == [(r.loss, r.grad_norm) for r in other_results]

    def test_results_are_the_same_on_every_rank(self, runs, name):
        one, other = runs[name][0]["twice"][0][0][1], runs[name][-1]["twice"][0][0][1]
        assert (one.loss, one.grad_norm, one.entropy, one.num_tokens) == (
            other.loss,
            other.grad_norm,
            other.entropy,
            other.num_tokens,
        )
        assert sorted(one.trajectories["sample_id"]) == list(range(100, 106))
        assert all((one.trajectories[key] == other.trajectories[key]).all() for key in one.trajectories)

    def test_non_finite_gradients_and_log_probs_update_nothing(self, runs, name):
        for rank in runs[name]:
            *refused, (after, updates) = rank["broken"]
            assert all(kept and not result.applied for result, kept in refused)
            infinite, overflow, poisoned = [result.problem for result, _ in refused]
            assert "NaN or inf in the gradient of decoder.layers.0.mlp.linear_fc2.weight" in infinite
            for problem in (overflow, poisoned):
                assert (
                    "NaN or inf in the log-probs, or an overflow of weight x advantage, of trajectories [100, 101, " in problem
                )
            assert after.applied and after.problem is None and updates == 1, "and the next step is an ordinary one"

    def test_calls_that_cannot_work_are_refused(self, runs, name):
        for rank in runs[name]:
            penalty, reference = rank["refused"]
            assert "objective.kl_coefficient: 0.1 needs the log-probs of a reference model" in penalty
            assert "built without one: it can be scored, not trained" in reference


def test_own_layers_never_ask_the_gpu_for_lengths(tmp_path):
    path = str(save_tiny_model("qwen2", tmp_path / "model"))
    layouts = [dict(context=2), dict(tensor=2, sequence_parallel=True)]
    assert run_ranks(2, "tests.distributed.step_worker:lengths_out_of_reach", path, layouts) == [[True, True]] * 2


OVERLAP = {
    2: {"dp2": {}, "cp2": dict(context=2)},
    4: {
        "dp4": {},
        "tp2-dp2": dict(tensor=2, sequence_parallel=True),
        "pp2-dp2": dict(pipeline=2),
        "pp2-interleaved-dp2": dict(pipeline=2, virtual_pipeline=2),
    },
}


@pytest.mark.parametrize(
    ("world_size", "kind", "names"),
    [
        (2, "qwen2-tied", ("dp2", "cp2")),
        (4, "qwen2-tied", ("dp4", "tp2-dp2", "pp2-dp2", "pp2-interleaved-dp2")),
        pytest.param(4, "qwen3-moe-mixed", ("dp4", "tp2-dp2", "pp2-dp2"), marks=pytest.mark.slow),
    ],
)
def test_steps_that_overlap_with_communication_are_the_same(world_size, kind, names, tmp_path):
    """But for rounding: buckets divide the gradient otherwise, so that ranks and the norm are added in another order."""
    path, layouts = str(save_tiny_model(kind, tmp_path / "model")), OVERLAP[world_size]
    found = run_ranks(world_size, "tests.distributed.step_worker:overlapped_and_not", path, [layouts[name] for name in names])
    for name, (overlapped, waited) in zip(names, found[0], strict=True):
        assert overlapped["buckets"] > 2 >= waited["buckets"], name
        for (loss, norm), (other_loss, other_norm) in zip(overlapped["norms"], waited["norms"], strict=True):
            assert (loss, norm) == (pytest.approx(other_loss, rel=1e-5, abs=1e-6), pytest.approx(other_norm, rel=1e-5)), name
        for key, value in waited["weights"].items():
            torch.testing.assert_close(overlapped["weights"][key], value, atol=2e-6, rtol=1e-6, msg=f"{name}: {key}")
