"""Engines on every node: two ranks stand for two nodes, each the first of its own, and the network is this host's."""

import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Client

import pytest

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout import node_agent
from pmpo_megatron.rollout.config import RolloutConfig
from pmpo_megatron.rollout.node_agent import MOST_STRANGERS, NodeAgent
from pmpo_megatron.rollout.remote_process import NodeAddress, RemoteProcess, own_nodes
from pmpo_megatron.rollout.vllm_settings import Launch, engine_settings
from tests.distributed.harness import free_port, run_ranks
from tests.integration.engine_worker import answers, engine_for, save_model
from tests.integration.runs import ROOT
from tests.integration.test_bridge import WORKER, same


@pytest.mark.parametrize("transport", ["auto", pytest.param("gloo", marks=pytest.mark.slow)])
def test_engines_on_all_nodes_get_the_weights_and_answer_and_are_replaced(transport, tmp_path):
    path = save_model("qwen2-tied", tmp_path / "model")
    found = run_ranks(2, f"{WORKER}:update_nodes", path, dict(transport=transport), str(tmp_path), timeout=280)[0]
    size = found["report"].bytes
    assert found["report"].handed == pytest.approx((size, size) if transport == "auto" else (size, 0), rel=0.05)
    assert found["report"].received == (0, 0), "each node has a copy of the model"
    assert [ids for ids, _ in found["before"]] != [ids for ids, _ in found["after"]], "the update changed what is generated"
    for which in ("after", "meanwhile", "restarted", "killed"):
        same(found[which], found["fresh"], tolerance=1e-6)
    assert found["killed, seconds"] < 100, "nobody waits out bridge.timeout_s, 200, for the one that died"
    assert found["left"] == [None, []], "no vLLM goes on when rank 0 has ended its own"


@pytest.fixture
def agent():
    made = NodeAgent()
    yield made
    made.close()


def test_an_engine_that_cannot_start_on_another_node_says_why(agent, tmp_path):
    config = RolloutConfig(max_model_len=10**6, threads=1, kv_cache_gib=0.1)
    path = save_model("qwen2", tmp_path / "model")
    settings = engine_settings(config, model_path=path, device="cpu", worker_extension=None)
    process = RemoteProcess(Launch(settings, "cpu", 1, 0, 1), agent.address, stall_s=100)
    with pytest.raises(RolloutError, match="(?s)did not start.*max_model_len.*was on 127.0.0.1"):
        process.start(200)
    deadline = time.monotonic() + 120  # the agent hears of it from the connection
    while agent.process_ids and time.monotonic() < deadline:
        time.sleep(0.1)
    assert agent.process_ids == [], "what did not start is ended"


def test_whoever_lacks_the_key_starts_nothing_and_does_not_stop_others(agent):
    silent = socket.create_connection((agent.address.host, agent.address.port))
    for _ in range(2):
        with pytest.raises(multiprocessing.AuthenticationError):
            Client((agent.address.host, agent.address.port), authkey=b"guessed")
    Client((agent.address.host, agent.address.port), authkey=agent.address.key).close()
    silent.close()
    assert agent.process_ids == []


def stranger(agent) -> socket.socket:
    """Somebody who has read the agent's challenge and does not answer."""
    caller = socket.create_connection((agent.address.host, agent.address.port), timeout=60)
    assert caller.recv(1000), "the challenge"
    return caller


def is_cut_off(caller: socket.socket) -> bool:
    """Waits for the end of the connection, for at most the socket's own 60 s."""
    try:
        return caller.recv(1) == b""
    except ConnectionResetError:
        return True


def test_strangers_do_not_add_up_and_do_not_keep_rank_0_out(agent, monkeypatch):
    monkeypatch.setattr(node_agent, "PROOF_S", 1000.0)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with ExitStack() as callers:
        strangers = [callers.enter_context(stranger(agent)) for _ in range(5 * MOST_STRANGERS)]
        assert all(map(is_cut_off, strangers[:-MOST_STRANGERS])), "each newcomer takes the place of the oldest"
        assert threading.active_count() <= threads + 2 * MOST_STRANGERS, "a thread and a timer for each"
        assert len(os.listdir("/proc/self/fd")) <= descriptors + len(strangers) + 2 * MOST_STRANGERS
        Client((agent.address.host, agent.address.port), authkey=agent.address.key).close()


def test_a_stranger_has_little_time_however_slowly_it_talks(agent, monkeypatch):
    monkeypatch.setattr(node_agent, "PROOF_S", 2.0)
    with stranger(agent) as silent, stranger(agent) as slow:
        slow.sendall(struct.pack("!i", 200))
        began = time.monotonic()
        try:
            while time.monotonic() < began + 60:  # each byte is a sign of life
                slow.sendall(b"x")
                time.sleep(0.3)
        except OSError:
            pass
        assert time.monotonic() < began + 50
        assert is_cut_off(silent)


def test_who_has_proved_the_key_may_take_its_time(agent, monkeypatch):
    monkeypatch.setattr(node_agent, "PROOF_S", 0.5)
    with Client((agent.address.host, agent.address.port), authkey=agent.address.key) as known, ExitStack() as callers:
        for _ in range(2 * MOST_STRANGERS):
            callers.enter_context(stranger(agent))
        assert not known.poll(1.5), "it is neither cut off nor told anything"


@pytest.mark.parametrize("header", [struct.pack("!i", 2**31 - 1), struct.pack("!iQ", -1, 2**62)], ids=["2 GiB", "4 EiB"])
def test_a_stranger_cannot_announce_a_large_message(agent, header):
    with stranger(agent) as caller:
        caller.sendall(header)
        assert is_cut_off(caller), "before any of it was sent or room was made for it"
    Client((agent.address.host, agent.address.port), authkey=agent.address.key).close()


def test_rank_0_is_told_when_its_agent_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        process = RemoteProcess(Launch({}, "cpu", 1, 0, 1), NodeAddress(*other.getsockname(), b"key"), stall_s=100)
        with pytest.raises(RolloutError, match=r"did not start.*127.0.0.1:\d+ did not prove"):
            process.start(20)


def test_a_node_of_its_own_serves_one_run_after_another(tmp_path):
    """As users start it, and after the first run, which waits for it."""
    path, key, port = save_model("qwen2", tmp_path / "model"), tmp_path / "key", free_port()
    key.touch(mode=0o600)
    key.write_text("0123456789abcdef")
    settings = dict(nodes="own", hosts=(f"127.0.0.1:{port}",), key_file=str(key))
    nodes = own_nodes(RolloutConfig(**settings))
    command = ["-m", "pmpo_megatron.commands.rollout_node", "--key-file", str(key), "--port", str(port)]
    node = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    try:
        found = []
        for _ in range(2):
            engine = engine_for(path, addresses=nodes, **settings)
            assert engine.hosts == ("127.0.0.1",) and engine.process_ids == [], "none on this host"
            found.append(answers(engine))
            engine.close()
        same(*found, tolerance=0)
        other = [replace(nodes[0], key=b"another key")]
        with pytest.raises(RolloutError, match=f"who answers at 127.0.0.1:{port} did not prove to have this run's key"):
            engine_for(path, addresses=other, **settings)
    finally:
        node.terminate()
    assert node.wait(timeout=60) == 0
