"""Whole plans: what fits, what does not and why, proposals, the dry run's report, the command."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pmpo_megatron.config import build
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.model import architecture
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner import HARDWARE, best_engines, best_layouts, hardware_here, memory_report, model_shape, plan
from pmpo_megatron.planner.memory import kinds_of_gpu
from pmpo_megatron.planner.parameters import state_bytes
from pmpo_megatron.planner.text import plan_lines
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.units import GIB

ROOT = Path(__file__).parents[3]
H100 = HARDWARE["h100-80gb"]


def config(name="Qwen/Qwen2.5-Math-7B", /, **sections):
    values = {
        "model": {"path": name, "log_prob_chunk": 2048},
        "parallel": {"tensor": 2, "sequence_parallel": True},
        "data": {"source": "arithmetic"},
        "batch": {"max_tokens_per_micro_batch": 8192},
        "rollout": {"tensor_parallel": 4, "gpu_memory_utilization": 0.3, "max_model_len": 4096, "kv_cache_gib": 12.0},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return build(RunConfig, values)


def test_a_plan_that_fits_says_so_and_adds_up():
    found = plan(config(), 8, H100)
    assert found.fits and found.data_parallel == 4
    assert plan_lines(found)[-1].startswith("fits, with ")
    with_engine, without = found.gpus
    assert with_engine.total - without.total == pytest.approx(found.engine.total + H100.engine_context_gib * GIB)
    assert without.state == state_bytes(found.shape, found.config.parallel, stage=0, replicas=4)
    assert found.fullest is with_engine


def test_more_memory_makes_it_fit():
    values = dict(batch={"max_tokens_per_micro_batch": 16384})
    small, large = (plan(config(**values), 8, HARDWARE[name]) for name in ("h100-80gb", "h200-141gb"))
    assert not small.fits and "memory: stage 0 with vLLM needs" in small.problems[0]
    assert large.fits


def test_recomputation_and_layout_move_the_numbers_the_right_way():
    totals = [plan(config(model={"recompute": r}), 8, H100).fullest.total for r in ("none", "selective", "full")]
    assert totals == sorted(totals, reverse=True)
    steps = [plan(config(model={"recompute": r}), 8, H100).step.seconds for r in ("none", "selective", "full")]
    assert steps == sorted(steps)
    split = plan(config(parallel={"context": 2}), 8, H100)
    assert split.fullest.activations.kept == pytest.approx(plan(config(), 8, H100).fullest.activations.kept / 2)


def test_micro_batches_are_taken_as_full_unless_a_step_is_smaller():
    assert plan(config(), 8, H100).load.full_tokens == 8192
    small = plan(config(batch={"prompts_per_round": 4, "steps_per_round": 4}, sampling={"max_tokens": 232}), 8, H100)
    assert small.load.full_tokens == 2 * (1024 + 232)  # 8 trajectories on 4 data-parallel ranks


def test_a_reference_model_is_weights_alone():
    penalised = plan(config(objective={"kl_coefficient": 0.01}), 8, H100)
    assert penalised.gpus[0].reference == pytest.approx(penalised.gpus[0].state.parameters, rel=1e-6)
    assert penalised.round.scoring == pytest.approx(2 * plan(config(), 8, H100).round.scoring)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"batch": {"max_tokens_per_micro_batch": 2048}},
            "2048 is less than the longest trajectory",
        ),
        ({"rollout": {"gpu_memory_utilization": 0.9}}, "vLLM wants 71.2 GiB free when it starts"),
        ({"rollout": {"tensor_parallel": 28}}, "more than a node's 8 GPUs"),
        ({"rollout": {"max_model_len": 4000}}, "= 4024 tokens, above rollout.max_model_len = 4000"),
        (
            {
                "model": {"path": "Qwen/Qwen3-30B-A3B"},
                "parallel": {"expert": 8, "expert_tensor": 1},
                "optimizer": {"distributed": False},
            },
            "optimizer.distributed: must be true with parallel.expert = 8",
        ),
    ],
)
def test_problems_name_the_setting(sections, message):
    found = plan(config(**sections), 8, H100)
    assert not found.fits and any(message in problem for problem in found.problems), found.problems
    assert plan_lines(found)[-1].startswith("does not fit")


def test_a_mixture_of_experts_says_what_a_token_uses_and_proposes_expert_parallelism():
    values = dict(parallel={"tensor": 4, "expert": 8, "expert_tensor": 1}, model={"recompute": "full"})
    mixture = config("Qwen/Qwen3-30B-A3B", rollout={"tensor_parallel": 8}, **values)
    text = "\n".join(plan_lines(plan(mixture, 16, H100)))
    assert "(30.53 billion parameters, of which a token uses 3.35)" in text and "DP4 EP8 ETP1," in text and ", experts " in text
    [best] = best_layouts(mixture, 16, H100, count=1)
    assert best.fits and best.config.parallel.expert > 1 and best.config.parallel.expert_tensor == 1


def test_spread_experts_are_gathered_by_the_first_rank_of_each():
    """Of two nodes of 8 the first holds the first copy of every expert: it gathers 28.99e9 of them, the second none."""
    mixture = config("Qwen/Qwen3-30B-A3B", parallel={"tensor": 4, "expert": 8, "expert_tensor": 1})
    experts, rest = 48 * 128 * 3 * 768 * 2048, 30_532_122_624 - 48 * 128 * 3 * 768 * 2048
    found = plan(mixture, 16, H100).checkpoint
    copied = 8 * 12 * max(experts / 8 / 2, rest / 4 / 4)  # of the larger buffer, on each of the node's processes
    assert found.saving == pytest.approx(20 * (experts + rest) + copied, rel=0.01)


def test_checkpoints_need_a_nodes_memory():
    """Saving: 12 bytes of states for each of the 7.6e9 parameters on all ranks together, and 20 on the first of 4 replicas."""
    found, parameters = plan(config(), 8, H100), 7.616e9
    assert found.checkpoint.saving == pytest.approx(32 * parameters, rel=0.01)
    assert 12 * parameters < found.checkpoint.loading < 2 * 12 * parameters + 8 * 12 * 2 * 152064 * 3584 / 2
    assert found.checkpoint.gpu == pytest.approx(2 * 28 * 2 * 18944 * 3584 / 2)
    assert f"{found.checkpoint.saving / GIB:.0f} GiB while one is saved" in "\n".join(plan_lines(found))
    overlapped = plan(config(parallel={"overlap_grad_reduce": True}), 8, H100).checkpoint
    assert overlapped.saving == pytest.approx(found.checkpoint.saving, rel=0.01)
    assert overlapped.loading > 3 * found.checkpoint.loading, "every rank owns a part of nearly every parameter"
    small = plan(config(), 8, replace(H100, host_gib=200.0))
    assert [problem.split(":")[0] for problem in small.problems] == ["checkpoints"] and "which has 200" in small.problems[0]


def test_own_layers_are_planned_as_such(monkeypatch):
    local = plan(config(model={"layers": "local"}), 8, H100)
    assert local.fullest.activations.kept > plan(config(), 8, H100).fullest.activations.kept
    assert any("layers are our own" in note for note in local.notes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(architecture, "transformer_engine_available", lambda: False)
    assert plan(config(), 8, H100).fullest == local.fullest, "a GPU machine without Transformer Engine"


def test_layouts_that_cannot_exist_are_errors():
    with pytest.raises(ConfigError, match="parallel.tensor: .* must divide the 6 processes"):
        plan(config(parallel={"pipeline": 4}), 6, H100)
    with pytest.raises(ConfigError, match="num_query_groups = 4|num_attention_heads = 28"):
        plan(config(parallel={"tensor": 8}), 8, H100)


def test_every_kind_of_recomputation_is_shown_as_it_would_be():
    found = plan(config(), 8, H100)
    for mode, amount in found.recompute.items():
        assert amount == plan(config(model={"recompute": mode}), 8, H100).fullest.activations.total
        assert f"{mode} {amount / GIB:.1f}" in "\n".join(plan_lines(found))
    assert found.recompute["none"] > found.recompute["selective"] > found.recompute["full"]


OWN_NODES = {"nodes": "own", "hosts": ["a:7400", "b:7400"], "key_file": "key"}


def test_nodes_that_do_not_train_are_not_counted_and_the_plan_says_so():
    found = plan(config(rollout=OWN_NODES), 8, H100)
    assert found.round.rollouts == 0 and found.fits and not any(gpu.engine for gpu in found.gpus)
    assert "rollouts: from 2 nodes of their own" in plan_lines(found) and any("are not counted" in note for note in found.notes)


def test_overlapped_rounds_take_the_longer_of_both():
    one, other = plan(config(), 8, H100).round, plan(config(round={"mode": "overlapped"}), 8, H100).round
    assert one.seconds == one.rollouts + one.training + one.weights
    assert other.seconds == max(other.rollouts, other.training + other.weights)


def test_fp8_halves_what_decoding_reads_but_the_vocabulary():
    full, half = (plan(config(rollout={"quantization": name}), 8, H100) for name in ("none", "fp8"))
    vocabulary = 2 * 2 * 152064 * 3584 / 4  # bytes on a GPU: two matrices, bfloat16, four GPUs
    assert half.engine.weights - vocabulary == pytest.approx((full.engine.weights - vocabulary) / 2, rel=1e-3)
    assert half.round.rollouts < full.round.rollouts


@pytest.mark.parametrize(
    ("parallel", "world_size", "engine", "expected"),
    [
        ({}, 8, 8, [(0, True)]),
        ({}, 8, 4, [(0, True), (0, False)]),
        ({"pipeline": 2}, 8, 4, [(0, True), (1, False)]),
        ({"pipeline": 4}, 8, 4, [(0, True), (1, True), (2, False), (3, False)]),
        ({"pipeline": 2}, 8, 0, [(0, False), (1, False)]),
    ],
)
def test_which_gpus_hold_the_engine(parallel, world_size, engine, expected):
    assert kinds_of_gpu(ParallelConfig(**parallel), world_size=world_size, engine_size=engine) == expected


def test_which_gpus_hold_engines_on_all_nodes():
    kinds = kinds_of_gpu(ParallelConfig(pipeline=2), world_size=16, engine_size=4, node_size=8)
    assert kinds == [(0, True), (0, False), (1, True), (1, False)]
    assert kinds_of_gpu(ParallelConfig(pipeline=2), world_size=16, engine_size=8, node_size=8) == [(0, True), (1, True)]


def test_proposals_fit_and_are_not_slower():
    own = plan(config(), 8, H100)
    found = best_layouts(config(), 8, H100)
    assert len(found) == 3 and all(p.fits for p in found)
    assert found[0].round.training <= own.round.training
    assert all(p.config.sampling == own.config.sampling and p.config.rollout == own.config.rollout for p in found)


def test_engines_are_proposed_that_use_the_whole_node():
    found = best_engines(config(), 8, H100)
    assert all(p.fits and p.config.rollout.engines * p.config.rollout.tensor_parallel == 8 for p in found)
    assert [p.round.seconds for p in found] == pytest.approx(sorted(p.round.seconds for p in found), rel=0.02)
    assert found[0].round.rollouts < plan(config(), 8, H100).round.rollouts, "which leaves half of the node idle"
    assert all(p.config.rollout.tensor_parallel != 8 for p in found), "does not divide 28 heads"
    assert all(p.config.parallel == config().parallel for p in found)
    assert best_engines(config(rollout=OWN_NODES), 8, H100) == []


def test_no_layout_fits_where_there_are_too_few_gpus():
    large = config("meta-llama/Llama-3.3-70B-Instruct", rollout={"tensor_parallel": 8})
    assert best_layouts(large, 8, H100) == []


def test_engines_take_gpus_of_the_first_node():
    assert [gpu.engine > 0 for gpu in plan(config(), 8, H100).gpus] == [True, False], "4 of 8 GPUs"
    two = plan(config(rollout={"engines": 2}), 8, H100)
    assert [gpu.engine > 0 for gpu in two.gpus] == [True]
    assert any("vLLM runs on 4 of a node's 8 GPUs" in note for note in plan(config(), 8, H100).notes)
    assert not any("rollout.engines" in note for note in two.notes)
    [problem] = plan(config(rollout={"engines": 3}), 16, H100).problems
    assert problem == "rollout.engines: 3 * 4 is more than a node's 8 GPUs; a vLLM runs on one node"


def test_engines_on_all_nodes():
    first, everywhere = (plan(config(rollout={"engines": 2, "nodes": nodes}), 16, H100) for nodes in ("first", "all"))
    assert [gpu.engine > 0 for gpu in first.gpus] == [True, False] and [gpu.engine > 0 for gpu in everywhere.gpus] == [True]
    assert everywhere.generation.tokens_per_s > first.generation.tokens_per_s
    assert any("rollout.nodes: " in note for note in first.notes) and not everywhere.notes
    assert any("on each of 2 nodes" in line or "of each of 2 nodes" in line for line in plan_lines(everywhere))


def test_nothing_is_proposed_where_rollouts_cannot_work():
    assert best_layouts(config(rollout={"max_model_len": 4000}), 8, H100) == []


def test_the_dry_runs_report():
    *report, faster = memory_report(config(run={"device": "cuda"}), 8, H100)
    assert report == plan_lines(plan(config(), 8, H100)) and faster.startswith("faster: rollout.engines=")
    whole = dict(rollout={"engines": 4, "tensor_parallel": 2, "kv_cache_gib": 9})
    assert memory_report(config(run={"device": "cuda"}, **whole), 8, H100) == plan_lines(plan(config(**whole), 8, H100))
    with pytest.raises(ConfigError, match="without any activations, and H100 80GB has 79.1"):
        memory_report(config("Qwen/Qwen2.5-72B", run={"device": "cuda"}), 8, H100)
    with pytest.raises(ConfigError, match="rollout.tensor_parallel: 8 must divide the model's 28 heads"):
        memory_report(config(run={"device": "cuda"}, rollout={"tensor_parallel": 8}), 8, H100)
    with pytest.raises(ConfigError, match="run.device: cpu, .* to plan for GPUs, set run.device=cuda"):
        memory_report(config("Qwen/Qwen2.5-72B", run={"device": "cpu"}), 2)
    small = config("Qwen/Qwen2.5-0.5B", run={"device": "cpu"})
    [line] = memory_report(small, 8)
    expected = state_bytes(model_shape(small.model.path), small.parallel, stage=0, replicas=4, dtype="float32").total
    assert f"{expected / GIB:.2f} GiB in each process" in line


def test_the_hardware_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware_here() is H100
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=40 * GIB))
    here = hardware_here()
    assert (here.name, here.memory_gib, here.peak_flops) == ("NVIDIA A100-SXM4-40GB", 40, 312e12)


@pytest.fixture
def run_tool(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: Qwen/Qwen2.5-Math-7B}\ndata: {source: arithmetic}\nparallel: {tensor: 2, sequence_parallel: true}\n"
        "rollout: {tensor_parallel: 4, gpu_memory_utilization: 0.3, max_model_len: 4096, kv_cache_gib: 12}\n"
    )

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plan_run.py", "--config", str(path), *arguments])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "tools/plan_run.py"), run_name="__main__")
        return done.value.code, *capsys.readouterr()

    return run


def test_the_command(run_tool):
    code, out, _ = run_tool("--hardware", "h100-80gb", "batch.max_tokens_per_micro_batch=8192", "--sequence-length", "1000")
    assert code == 0
    assert "128 trajectories of 1000 tokens" in out and "proposals, fastest training first:" in out
    assert "engines and memory by turns, shortest rounds first:\n  rollout.engines=" in out
    assert run_tool("--hardware", "a100-80gb", "--proposals", "0")[0] == 1
    code, _, err = run_tool("model.path=/nowhere")
    assert code == 2 and "error: model.path: /nowhere has no config.json" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "0"], "--world-size: 0 must be at least 1"),
        (["--sequence-length", "-5"], "--sequence-length: -5 must be at least 1"),
        (["--sequence-length", "9999"], "a mean of 9999 tokens; the longest trajectory has 4024"),
        (["--proposals", "-1"], "--proposals: -1 must be at least 0"),
    ],
)
def test_bad_arguments_are_one_line(run_tool, arguments, message):
    code, out, err = run_tool(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_a_layout_that_cannot_be_comes_with_proposals_that_can(run_tool):
    code, out, err = run_tool("--hardware", "h100-80gb", "--world-size", "16", "parallel.pipeline=3", "--proposals", "1")
    assert code == 2 and "must divide the 16 processes" in err
    assert out.startswith("proposals, fastest training first:") and " DP" in out
