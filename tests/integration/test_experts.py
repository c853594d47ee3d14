"""A mixture of experts in a real vLLM on CPU: where it says that tokens went, and what the trainer makes of it."""

import json

import numpy as np
import pytest
import torch

from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.model.routing import route_format
from pmpo_megatron.rollout.config import RolloutConfig
from pmpo_megatron.rollout.factory import make_engine
from tests.distributed.harness import run_ranks
from tests.integration import runs
from tests.integration.engine_worker import prompts, save_model
from tests.integration.expert_worker import SAMPLED

WORKER = "tests.integration.expert_worker"
MANY = dict(num_experts=64, num_experts_per_tok=8)  # so many that bfloat16 and float32 often choose others


def routes_of_transformers(path, token_ids):
    """(experts [tokens, layers, K] with -1 for dense layers, how far the last chosen is above the first left out)."""
    import transformers

    model, shape = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), read_shape(path)
    experts = np.full((len(token_ids), shape.num_layers, shape.experts.per_token), -1)
    margins = np.full(experts.shape[:2], np.inf)
    for number, layer in enumerate(model.model.layers):
        if shape.is_sparse(number):

            def note(_, __, out, number=number):
                largest = out[0].topk(shape.experts.per_token + 1)
                experts[:, number] = largest.indices[:, :-1].numpy()
                margins[:, number] = (largest.values[:, -2] - largest.values[:, -1]).numpy()

            layer.mlp.gate.register_forward_hook(note)
    with torch.no_grad():
        model(torch.tensor(token_ids)[None].long())
    return experts, margins


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3-moe-mixed", dict(engines=2)),
        pytest.param("qwen2-moe", dict(tensor_parallel=2), marks=pytest.mark.slow),
    ],
)
def test_the_engine_says_where_tokens_went(kind, settings, tmp_path):
    path = save_model(kind, tmp_path / "model")
    record = str(tmp_path / "rollouts.jsonl")
    [groups] = run_ranks(1, f"{WORKER}:rollouts_with_routes", path, settings | dict(record_to=record))
    routes = route_format(read_shape(path))
    for group in groups:
        for rollout in group.rollouts:
            ids = np.concatenate([group.prompt.token_ids, rollout.token_ids])
            assert rollout.routes.shape == (len(ids), routes.layers, routes.per_token) and rollout.routes.dtype == np.uint8
            assert (rollout.routes[-1] == routes.unknown).all(), "the last token is never computed"
            experts, margins = routes_of_transformers(path, ids)
            same = (np.sort(rollout.routes[:-1], axis=-1) == np.sort(experts[:-1], axis=-1)).all(axis=-1)
            dense = experts[0, :, 0] == -1
            assert (rollout.routes[:-1, dense] == routes.unknown).all()
            assert (same | (margins[:-1] < 1e-5))[:, ~dense].all(), "others only where two are as good"
    config = RolloutConfig(engine="replay", replay_from=record)
    replay = make_engine(config, model_path=path, device="cpu", worker_extension=None, routes=routes)
    for one, other in zip(replay.generate(prompts(), SAMPLED, round_index=0), groups, strict=True):
        for a, b in zip(one.rollouts, other.rollouts, strict=True):
            assert np.array_equal(a.routes, b.routes) and a.routes.dtype == b.routes.dtype, "and so does a record"


def test_the_mismatch_of_a_bfloat16_engine_falls_when_its_routes_are_replayed(tmp_path):
    path = save_model("qwen3-moe", tmp_path / "model", **MANY)
    [(exact, rounded)] = run_ranks(1, f"{WORKER}:mismatch", path, ("float32", "bfloat16"), timeout=280)
    assert max(gaps.max() for gaps in exact.values()) < 1e-4
    assert rounded["engine's"].mean() < 0.7 * rounded["own"].mean(), "what is left is the arithmetic's"


@pytest.mark.parametrize("mode", ["synchronous", pytest.param("in_flight", marks=pytest.mark.slow)])
def test_a_run_replays_the_engines_routes_and_reports_them(mode, tmp_path):
    path, directory = save_model("qwen3-moe", tmp_path / "model"), tmp_path / "run"
    settings = ["round.routing_replay=rollout", "objective.balance_coefficient=0.01", "rollout.dtype=bfloat16", "run.rounds=2"]
    runs.train(path, directory, *settings, f"round.mode={mode}", processes=2)
    rows = [row for row in runs.metrics(directory) if "routing/busiest_expert" in row]
    assert len(rows) == 2
    for row in rows:
        assert 1 <= row["routing/busiest_expert"] <= 4 and row["routing/unused_experts"] == 0
        assert 0 < row["routing/other_than_engine"] < (0.2 if mode == "synchronous" else 1), "in flight the policy has moved"
    records = [json.loads(line) for line in (directory / "experts.jsonl").read_text().splitlines()]
    assert [len(record["0"]) for record in records] == [8, 8] and len(
        {sum(v) for k, v in records[0].items() if k != "step"}
    ) == 1
    assert "Tokens of each expert over an equal share" in (directory / "report.html").read_text()
