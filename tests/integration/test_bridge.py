"""Real Megatron policies into real vLLM engines: after an update the engine is the one that loads the exported checkpoint."""

import re

import numpy as np
import pytest

from tests.distributed.harness import run_ranks
from tests.integration.engine_worker import SMALL, save_model

WORKER = "tests.integration.engine_worker"
LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, dict(tensor=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline=2)),
    "dp2": (2, {}),
    "tp2-pp2": (4, dict(tensor=2, pipeline=2, sequence_parallel=True)),
    "tp2-ep2": (4, dict(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1)),
}
GLOO, BUCKETS = dict(transport="gloo", bucket_mib=SMALL), dict(bucket_mib=SMALL)
slow = pytest.mark.slow
CASES = [
    ("tp1", "qwen2-tied", {}, BUCKETS),
    ("tp1", "qwen2-tied", dict(engines=2), BUCKETS),
    ("tp2", "qwen2", {}, GLOO),
    ("tp2-pp2", "qwen2-tied", {}, BUCKETS),
    ("tp2", "qwen2-tied", dict(tensor_parallel=2), BUCKETS),
    ("tp1", "qwen3-moe", {}, BUCKETS),
    pytest.param("tp1", "qwen2-tied", {}, {}, marks=slow),
    pytest.param("tp2", "qwen2-tied", dict(engines=2, tensor_parallel=2), GLOO, marks=slow),
    pytest.param("pp2", "qwen2-tied", dict(tensor_parallel=2), GLOO, marks=slow),
    pytest.param("tp1", "qwen2", dict(tensor_parallel=2), {}, marks=slow),
    pytest.param("pp2", "qwen2", dict(tensor_parallel=2), {}, marks=slow),
    pytest.param("dp2", "qwen3", {}, {}, marks=slow),
    pytest.param("tp2", "llama3-tied", {}, dict(verify="sample"), marks=slow),
    pytest.param("tp1", "llama", {}, dict(verify="off"), marks=slow),
    pytest.param("tp2", "qwen2-moe", dict(tensor_parallel=2), BUCKETS, marks=slow),
    pytest.param("pp2", "qwen3-moe-mixed", dict(tensor_parallel=2), {}, marks=slow),
    pytest.param("tp1", "mixtral", {}, {}, marks=slow),
    pytest.param("tp2-ep2", "qwen2-moe", dict(engines=2), BUCKETS, marks=slow),
]


def same(one: list, other: list, *, tolerance: float) -> None:
    """The same tokens, and log-probs that differ by ``tolerance`` and, as batches may differ, two of their spacings."""
    assert [ids for ids, _ in one] == [ids for ids, _ in other]
    for (_, a), (_, b) in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance + 2 * np.spacing(np.abs(b).max(initial=0), dtype=np.float32), rtol=0)


@pytest.mark.parametrize(("layout", "kind", "engine", "bridge"), CASES)
def test_an_updated_engine_equals_a_freshly_loaded_one(layout, kind, engine, bridge, tmp_path):
    world_size, parallel = LAYOUTS[layout]
    path = save_model(kind, tmp_path / "model")
    found = run_ranks(world_size, f"{WORKER}:update_and_compare", path, parallel, engine, bridge, str(tmp_path), timeout=280)[0]
    assert [ids for ids, _ in found["before"]] != [ids for ids, _ in found["after"]], "the update changed what is generated"
    same(found["after"], found["fresh"], tolerance=1e-6)
    same(found["restarted"], found["fresh"], tolerance=1e-6)
    assert found["version"] == found["report"].version == 7
    report, lanes = found["report"], LAYOUTS[layout][0]
    assert report.verify == bridge.get("verify", "full")
    assert sum(report.handed) == pytest.approx(report.bytes, rel=0.2), "padding of the vocabulary and of buckets"
    assert report.handed[0] < 1.25 * sum(report.handed) / lanes, "rank 0 has its share"
    assert report.received[0] <= report.handed[0], "and gets no more than that from others"


@pytest.mark.parametrize("engines", [1, 2])
def test_what_is_corrupted_in_transit_is_caught_and_nothing_is_generated_from_it(engines, tmp_path):
    [found] = run_ranks(1, f"{WORKER}:corrupt_and_recover", save_model("qwen2", tmp_path / "model"), engines, timeout=280)
    assert f"rollout worker 0: {found['third']} is not what was sent" in found["flipped"]
    assert "missing: " in found["left_out"]
    for name in ("flipped", "left_out"):
        assert "a full update must succeed first" in found[f"{name}, generate"]
    assert found["version"] == 2 and len(found["answers"]) == 4, "and a whole update repairs it"
    assert found["killed, version"] == 3, "an engine that dies while it takes weights is started again and gets them"
    assert found["killed, seconds"] < 100, "the other engine does not wait out bridge.timeout_s, 200, for the one that died"
    same(found["killed"], found["answers"], tolerance=1e-6)


def test_an_engine_that_slept_takes_weights_again_and_is_started_again_if_it_died_asleep(tmp_path):
    """vLLM's CPU build frees nothing, and does everything else: what comes when, and that no token is made meanwhile."""
    [found] = run_ranks(1, f"{WORKER}:sleep_and_wake", save_model("qwen2", tmp_path / "model"), str(tmp_path), timeout=280)
    assert found["asked"] == "the engine is asleep; an update wakes it"
    assert any(found["cached, awake"]) and not any(found["cached, woken"]), "prefixes are forgotten"
    same(found["woken"], found["answers"], tolerance=1e-6)
    assert found["dead meanwhile"] == [False, True], "the trainer has the memory in which it would be started"
    assert found["replaced"] == [True, False]
    assert [ids for ids, _ in found["trained"]] != [ids for ids, _ in found["answers"]]
    same(found["trained"], found["trained, again"], tolerance=1e-6)
    steps = re.findall(r"fall asleep|wake up tags \S+|state to UNPAUSED", found["log"])
    assert steps == ["fall asleep", "wake up tags ['weights'].", "wake up tags ['kv_cache'].", "state to UNPAUSED"] * 2
    assert "Selective discard is not supported on CPU" in found["kv"], "everything before it has been done"
