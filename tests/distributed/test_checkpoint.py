"""Checkpoints on real process groups: exact on the same layout, right on every other, whole or absent."""

import pytest
import torch

from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.checkpoint import checkpoint_bytes_of_node
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_model

WORKER = "tests.distributed.checkpoint_worker"
SAVED_ON = {"single": (1, {}), "tp2": (2, dict(tensor=2, sequence_parallel=True)), "dp2": (2, {})}
PAIR = {
    "tp2": dict(tensor=2, sequence_parallel=True),
    "pp2": dict(pipeline=2),
    "pp2-interleaved": dict(pipeline=2, virtual_pipeline=2),
    "cp2": dict(context=2),
    "dp2": {},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("qwen2", tmp_path_factory.mktemp("model")))


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module", params=SAVED_ON)
def saved(request, model, tmp_path_factory):
    world_size, layout = SAVED_ON[request.param]
    root = str(tmp_path_factory.mktemp("checkpoints"))
    return request.param, root, run_ranks(world_size, f"{WORKER}:save_and_go_on", model, root, layout)


class TestResume:
    def test_every_layout_goes_on_where_the_run_was_saved(self, saved, model):
        """Loaded weights are the saved bits; two rounds later only the layouts' rounding differs. Adam's second moments
        of this optimizer make any loss of its state show: a fresh one is off by more than 1e-3."""
        name, root, reference = saved
        layouts = list(PAIR.values())
        found = run_ranks(2, f"{WORKER}:go_on", model, root, layouts)
        for layout, result in zip(PAIR, found[0], strict=True):
            assert result["progress"] == {"round": 2, "note": "kept"}
            assert largest_difference(result["loaded"], reference[0]["saved"]) == 0.0, (name, layout)
            assert result["updates"] == reference[0]["updates"] == 8
            assert largest_difference(result["weights"], reference[0]["weights"]) < 2e-4, (name, layout)

    def test_the_same_layout_goes_on_bit_by_bit(self, saved, model):
        name, root, reference = saved
        world_size, layout = SAVED_ON[name]
        found = run_ranks(world_size, f"{WORKER}:go_on", model, root, [layout])
        assert largest_difference(found[0][0]["weights"], reference[0]["weights"]) == 0.0
        assert [rank[0]["numbers"] for rank in found] == [rank["numbers"] for rank in reference], "random states"


EXPERTS = {
    "ep2": dict(expert=2),
    "tp2-ep2": dict(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
    "pp2": dict(pipeline=2),
    "dp2": {},
}


@pytest.mark.parametrize("saved_on, resumed_on", [("ep2", ("ep2", "tp2-ep2", "pp2")), ("dp2", ("ep2",))])
def test_a_run_with_experts_goes_on_where_they_are_spread_otherwise(saved_on, resumed_on, tmp_path):
    """Experts that are spread have an optimizer of their own: its state reaches a run that has one optimizer, and back."""
    path, root = str(save_tiny_model("qwen2-moe", tmp_path / "model")), str(tmp_path / "checkpoints")
    reference = run_ranks(2, f"{WORKER}:save_and_go_on", path, root, EXPERTS[saved_on])
    found = run_ranks(2, f"{WORKER}:go_on", path, root, [EXPERTS[name] for name in resumed_on])
    for name, result in zip(resumed_on, found[0], strict=True):
        assert largest_difference(result["loaded"], reference[0]["saved"]) == 0.0, name
        assert result["updates"] == reference[0]["updates"] == 8
        allowed = 0.0 if name == saved_on else 2e-4
        assert largest_difference(result["weights"], reference[0]["weights"]) <= allowed, name


@pytest.mark.parametrize("name", ["single", "tp2"])
def test_a_checkpoint_written_in_the_background_holds_the_weights_of_its_round(name, model, tmp_path):
    """Training goes on at once and changes the weights; what is written is the copy."""
    world_size, layout = SAVED_ON[name]
    root = str(tmp_path / "c")
    reference = run_ranks(world_size, f"{WORKER}:save_while_training", model, root, layout)
    assert reference[0]["unfinished"] == ["round-00000002.partial"] and reference[0]["finished"] == ["round-00000002"]
    found = run_ranks(world_size, f"{WORKER}:go_on", model, root, [layout])
    assert found[0][0]["progress"] == {"round": 2, "note": "kept"}
    assert largest_difference(found[0][0]["loaded"], reference[0]["saved"]) == 0.0
    assert largest_difference(found[0][0]["weights"], reference[0]["weights"]) == 0.0


class TestIntegrity:
    def test_only_whole_checkpoints_are_kept_and_used(self, model, tmp_path):
        [found] = run_ranks(1, f"{WORKER}:retention", model, str(tmp_path / "c"))
        assert found["names"] == ["round-00000004", "round-00000005"]
        assert found["second"] == {"round": 4}, "the newest is damaged: the one before it is used"
        assert "every checkpoint is damaged" in found["error"]

    def test_copies_and_links_of_a_user_are_neither_removed_nor_read(self, model, tmp_path):
        [found] = run_ranks(1, f"{WORKER}:foreign_names", model, str(tmp_path / "c"))
        foreign = ["round-00000006.bak", "round-best", "round-best-2", "round-latest"]
        assert found["names"] == sorted(["round-00000003", "round-00000004", *foreign])
        assert found["progress"] == {"round": 4}

    def test_records_of_another_shape_fall_back_to_the_checkpoint_before(self, model, tmp_path):
        [found] = run_ranks(1, f"{WORKER}:broken_records", model, str(tmp_path / "c"))
        assert len(found) == 8 and all(number == (2 if what == "nothing" else 1) for what, number in found), found

    def test_a_directory_that_is_removed_is_made_again(self, model, tmp_path):
        [found] = run_ranks(1, f"{WORKER}:removed_directory", model, str(tmp_path / "c"))
        assert found["again"] is True and found["same"] is True and found["there"] == ["round-00000002"]
        assert found["during"] is False and found["after"] is True and found["progress"] == {"round": 4}

    def test_the_space_for_a_checkpoint_is_known_before_it_is_written(self, model, tmp_path):
        [found] = run_ranks(1, f"{WORKER}:space", model, str(tmp_path / "c"))
        assert found["needed"] <= found["stored"] <= found["size"] and found["stored"] < 1.02 * found["needed"]
        assert found["saves"] == [False, False] and found["left"] == ["round-00000001"]
        assert f"it needs {found['needed']} bytes and {found['needed'] - 1} bytes are free" in found["error"]

    def test_a_full_disk_keeps_the_checkpoint_before(self, model, tmp_path):
        [found] = run_ranks(1, f"{WORKER}:full_disk", model, str(tmp_path / "c"))
        assert found["saved"] is False
        assert "not saved" in found["error"] and "the checkpoints before it are intact" in found["error"]
        assert found["left"] == ["round-00000001"]
        assert found["again"] is True and found["progress"] == {"round": 3}


def test_loading_does_not_need_the_random_states_file_of_every_rank(model, tmp_path):
    """Saved by one process, loaded by two: told, not refused."""
    root = str(tmp_path / "c")
    run_ranks(1, f"{WORKER}:save_and_go_on", model, root, {})
    found = run_ranks(2, f"{WORKER}:go_on", model, root, [{}])
    assert torch.is_tensor(next(iter(found[0][0]["weights"].values())))


def test_a_rank_that_stalls_while_saving_is_named(model, tmp_path):
    with pytest.raises(AssertionError, match=r"in planning a checkpoint: rank 1 \(.*\) gave no sign of life for 3 s"):
        run_ranks(2, f"{WORKER}:stopped_while_saving", model, str(tmp_path))


def test_the_optimizers_state_is_gathered_on_one_host_and_read_by_its_owners(model, tmp_path):
    """Gathering on the GPU takes more memory than a GPU has left, and room for everything on every rank more than a host."""
    first, second = run_ranks(2, f"{WORKER}:optimizer_bytes", model, str(tmp_path))
    assert (first["saving"], second["saving"]) == (first["whole"], 0)
    for rank in (first, second):  # a parameter that lies on both ranks is read by both
        assert rank["owned"] <= rank["loading"] <= rank["owned"] + 2 * rank["largest"]
    assert first["loading"] + second["loading"] <= first["whole"] + first["largest"]
    sizes = dict(world_size=2, node_size=1, dtype="float32", distributed=True)
    planned = checkpoint_bytes_of_node(read_shape(model), ParallelConfig(), **sizes)
    together = max(first["together"], second["together"])
    assert planned.loading == pytest.approx(together, abs=first["largest"] / 10)  # but for a norm at the seam of the ranks
    # Padding between parameters is copied, too; what gloo holds a second time comes on top of what is gathered.
    assert first["whole"] * (1 + 8 / 12 + 1 / 2) <= planned.saving <= 1.05 * first["whole"] * (1 + 8 / 12 + 1 / 2)
