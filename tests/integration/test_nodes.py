"""Engines on every node: two ranks stand for two nodes, each the first of its own, and the network is this host's."""

import pytest

from tests.distributed.harness import run_ranks
from tests.integration.engine_worker import save_model
from tests.integration.test_bridge import WORKER, same


@pytest.mark.parametrize(
    ("bridge", "transport"),
    [({}, "shared_memory+gloo"), pytest.param(dict(transport="disk"), "disk", marks=pytest.mark.slow)],
)
def test_engines_on_all_nodes_get_the_weights_and_answer_and_are_replaced(bridge, transport, tmp_path):
    path = save_model("qwen2-tied", tmp_path / "model")
    found = run_ranks(2, f"{WORKER}:update_nodes", path, bridge, str(tmp_path), timeout=280)[0]
    assert found["transport"] == transport
    assert [ids for ids, _ in found["before"]] != [ids for ids, _ in found["after"]], "the update changed what is generated"
    for which in ("after", "restarted", "killed"):
        same(found[which], found["fresh"], tolerance=1e-6)
    assert found["killed, seconds"] < 100, "nobody waits out bridge.timeout_s, 200, for the one that died"
    assert found["left"] == [None, []], "no vLLM goes on when rank 0 has ended its own"
