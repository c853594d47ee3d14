"""Memory that trainer and engines share by turns: what each phase holds, what moving costs, what is proposed."""

from dataclasses import replace

import pytest

from pmpo_megatron.planner import HARDWARE, best_engines, plan
from pmpo_megatron.planner.text import plan_lines
from pmpo_megatron.units import GIB
from tests.unit.planner.test_plan import config

H100 = HARDWARE["h100-80gb"]


def test_memory_by_turns_is_what_each_phase_holds():
    both = {"rollout": {"engines": 2, "sleep": "kv"}, "model": {"offload": "optimizer"}}
    [together] = plan(config(rollout={"engines": 2}), 8, H100).gpus
    found = plan(config(**both), 8, H100)
    training, rollouts = found.gpus
    engine, freed = found.engine, found.engine.kv_cache + found.engine.forward
    assert together.total - training.total == pytest.approx(freed) and freed > 12 * GIB
    contexts = (H100.reserved_gib + H100.engine_context_gib) * GIB
    assert rollouts.total == pytest.approx(together.state.parameters + engine.total + contexts)
    assert found.moved.states == together.state.optimizer and found.moved.weights == 0
    out = together.state.optimizer / H100.host_link_bytes_per_s
    assert found.round.moving == pytest.approx(out), "and back while log-probs are scored"
    assert found.round.seconds == pytest.approx(plan(config(rollout={"engines": 2}), 8, H100).round.seconds + out)
    text = "\n".join(plan_lines(found))
    assert (
        "stage 0 with vLLM, training" in text and "stage 0 with vLLM, rollouts" in text and "of a node's; out and back" in text
    )
    both["rollout"]["sleep"] = both["model"]["offload"] = "all"
    training, rollouts = plan(config(**both), 8, H100).gpus
    assert training.engine == engine.graphs and rollouts.state.total == 0


def test_what_is_moved_out_needs_a_nodes_memory():
    found = plan(config(model={"offload": "all"}), 8, replace(H100, host_gib=300.0))
    assert found.moved.total * 8 > 100 * GIB
    assert any("beside 142 of model.offload" in problem for problem in found.problems), found.problems
    assert plan(config(), 8, replace(H100, host_gib=300.0)).fits


def test_memory_by_turns_is_proposed_where_rollouts_want_for_it():
    large = config(
        "Qwen/Qwen2.5-32B",
        parallel={"tensor": 8, "pipeline": 2},
        rollout={"tensor_parallel": 8, "nodes": "all", "max_model_len": 9216},
        sampling={"max_tokens": 8192},
        batch={"max_tokens_per_micro_batch": 9216},
    )
    best = best_engines(large, 32, H100, sequence=8192)[0]
    assert best.config.rollout.sleep == "kv" and best.config.rollout.kv_cache_gib > 30
    overlapped = replace(large, round=replace(large.round, mode="overlapped"))
    others = best_engines(overlapped, 32, H100, sequence=8192)
    assert {p.config.rollout.sleep for p in others} == {"none"}
    assert best.round.rollouts < 0.9 * others[0].round.rollouts
