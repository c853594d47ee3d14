"""Rollouts from a running vLLM server: updated weights, log-probs, and a server that is not there."""

import os
import subprocess
import sys
import time
import urllib.request

import pytest

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout.config import RolloutConfig
from pmpo_megatron.rollout.factory import make_engine
from tests.distributed.harness import free_port, run_ranks
from tests.integration.engine_worker import EXTENSION, engine_for, prompts, save_model
from tests.integration.runs import ROOT
from tests.integration.test_bridge import same
from tests.integration.test_rollout import flat, sampling


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model("qwen2", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def url(path, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = f"""-m vllm.entrypoints.launchers.api_server.entry --model {path} --host 127.0.0.1 --port {port} --dtype float32
        --enable-scale-out --logprobs-mode processed_logprobs --worker-extension-cls {EXTENSION} --enforce-eager
        --distributed-executor-backend vllm.v1.executor.uniproc_executor.UniProcExecutor --kv-cache-memory-bytes 100000000
        --generation-config vllm --max-model-len 256"""
    environment = dict(os.environ, VLLM_SERVER_DEV_MODE="1", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    environment |= dict(TORCH_COMPILE_DISABLE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, *command.split()], env=environment, stdout=file, stderr=file, cwd=ROOT)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 200
    while True:
        try:
            urllib.request.urlopen(address + "/health", timeout=10)
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.3)
    yield address
    process.terminate()
    process.wait(timeout=60)


def test_a_server_gives_the_responses_that_an_engine_here_gives(path, url):
    server = make_engine(RolloutConfig(engine="server", urls=(url, url)), model_path=path, device="cpu", worker_extension=None)
    here = engine_for(path)
    try:
        one, other = (flat(engine.generate(prompts(), sampling(), round_index=1)) for engine in (server, here))
        assert [row[:2] for row in one] == [row[:2] for row in other]
        for a, b in zip(one, other, strict=True):
            assert a[2] == pytest.approx(b[2], abs=1e-5)
    finally:
        here.close()


# The second case finds the weights of the first in the server.
@pytest.mark.parametrize("transport, learning_rate", [("auto", 0.02), ("disk", 0.03)])
def test_weights_reach_a_server_and_one_that_was_started_again_gets_them_anew(path, url, tmp_path, transport, learning_rate):
    bridge = dict(transport=transport, directory=str(tmp_path))
    worker = "tests.integration.engine_worker:update_servers"
    [found] = run_ranks(1, worker, path, [url], str(tmp_path), bridge, learning_rate, timeout=250)
    assert [ids for ids, _ in found["before"]] != [ids for ids, _ in found["after"]]
    same(found["after"], found["fresh"], tolerance=1e-5)
    same(found["again"], found["fresh"], tolerance=1e-5)
    assert found["restored"] == [5]


def test_a_server_that_is_down_is_named_after_bounded_attempts(path):
    address = f"http://127.0.0.1:{free_port()}"
    config = RolloutConfig(engine="server", urls=(address,), server_attempts=2)
    started = time.monotonic()
    with pytest.raises(RolloutError, match=f"{address}/collective_rpc: .*; gave up after 2 attempts"):
        make_engine(config, model_path=path, device="cpu", worker_extension=None)
    assert time.monotonic() - started < 100
