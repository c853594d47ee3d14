"""What the processes of the rollout and bridge tests run: real Megatron policies and real vLLM engines on CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from pmpo_megatron.algo.objective import PRESETS
from pmpo_megatron.bridge.buckets import title
from pmpo_megatron.bridge.config import BridgeConfig
from pmpo_megatron.bridge.media import SharedFile
from pmpo_megatron.bridge.sync import WeightBridge
from pmpo_megatron.data.packing import pack
from pmpo_megatron.errors import RolloutError, WeightSyncError
from pmpo_megatron.hf.safetensors import copy_side_files
from pmpo_megatron.hf.tiny_model import make_tokenizer
from pmpo_megatron.model.micro_batch import prepare
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel.collectives import barrier, gather_objects
from pmpo_megatron.parallel.shards import sequence_multiple
from pmpo_megatron.parallel.stand_by import StandBy
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.factory import make_engine
from pmpo_megatron.rollout.node_agent import NodeAgent
from pmpo_megatron.types import Prompt, Sample
from tests.tiny_models import save_tiny_model
from tests.weights import whole_weights

SMALL = 0.06  # MiB: several buckets, and tensors that are larger than one
EXTENSION = "pmpo_megatron.bridge.vllm_worker.WeightReceiver"
GREEDY = SamplingConfig(samples_per_prompt=1, temperature=0.0, max_tokens=12)


def save_model(kind: str, directory: Path, **changes: Any) -> str:
    """A model that vLLM's CPU kernels take (heads of 32), with a tokenizer; 86 tokens, which Megatron pads to 128."""
    tokenizer = make_tokenizer()
    sizes = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=96, head_dim=32)
    save_tiny_model(kind, directory, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes, **changes)
    tokenizer.save_pretrained(directory)
    return str(directory)


def prompts(count: int = 4) -> list[Prompt]:
    rng = np.random.default_rng(5)
    return [
        Prompt(index, rng.integers(2, 80, 5 + 7 * index).astype(np.int32), f"problem {index}", ("1",)) for index in range(count)
    ]


def engine_for(path: str, *, addresses=(), routes=None, logs=None, **settings):
    config = RolloutConfig(**dict(threads=1, kv_cache_gib=0.1, max_num_seqs=32) | settings)
    where = dict(device="cpu", nodes=addresses, logs=logs)
    return make_engine(config, model_path=path, worker_extension=EXTENSION, routes=routes, **where)


def train(policy: Policy, parallel: ParallelConfig) -> None:
    """A step so large that every output changes."""
    rng = np.random.default_rng(3)
    samples = [
        Sample(
            sample_id=i,
            group_id=0,
            prompt_ids=rng.integers(2, 80, 6).astype(np.int32),
            response_ids=rng.integers(2, 80, 20).astype(np.int32),
            rollout_log_probs=np.zeros(20, dtype=np.float32),
            truncated=False,
            advantage=(-1.0) ** i,
        )
        for i in range(4)
    ]
    state = policy.state
    mine = samples[state.dp_rank :: state.dp_size]
    packed = [pack([sample], [0.25], sequence_multiple=sequence_multiple(parallel)) for sample in mine]
    scored = score(policy, [prepare(each, state) for each in packed], temperature=1.0)
    result = optimizer_step(policy, scored, objective=PRESETS["pmpo"], progress=0.0, temperature=1.0)
    assert result.applied


def answers(engine) -> list[tuple[list[int], np.ndarray]]:
    groups = engine.generate(prompts(), GREEDY, round_index=0)
    return [(group.rollouts[0].token_ids.tolist(), group.rollouts[0].log_probs) for group in groups]


def answers_of_all(engine) -> list[tuple[list[int], np.ndarray]]:
    """As `answers`, when every vLLM has been started again that died: the others answer without waiting for it."""
    deadline = time.monotonic() + 250
    while not all(process.fresh for process in engine._processes):
        assert time.monotonic() < deadline, "a vLLM was not started again"
        time.sleep(0.05)
    return answers(engine)


def export(bridge: WeightBridge, path: str, target: Path) -> None:
    """The policy as a Hugging Face checkpoint. Collective."""
    weights = whole_weights(bridge.policy)
    if bridge.policy.state.is_main:
        target.mkdir()
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        copy_side_files(path, target)


def update_and_compare(path: str, layout: dict, engine_settings: dict, bridge_settings: dict, directory: str) -> dict | None:
    """On rank 0: greedy answers of the engine before and after an update, and of one loaded from the exported checkpoint."""
    parallel = ParallelConfig(**layout)
    state = initialize(parallel, device="cpu")
    policy = Policy.build(ModelConfig(path=path), OptimizerConfig(learning_rate=0.02), parallel, state)
    found = {}
    with contextlib.ExitStack() as parts:
        engine = engine_for(path, **engine_settings) if state.is_main else None
        if engine is not None:
            parts.callback(engine.close)
            found["before"] = answers(engine)
        bridge = WeightBridge(policy, engine, BridgeConfig(**bridge_settings), stand_by := StandBy(state))
        parts.callback(bridge.close)
        train(policy, parallel)
        report = bridge.push(7)
        found |= {"report": report, "version": engine.version if engine else None}
        if engine is not None:
            found["after"] = answers(engine)
        target = Path(directory) / "exported"
        export(bridge, path, target)
        if engine is not None:
            os.kill(engine.process_ids[0], signal.SIGKILL)
        found["restarted"] = stand_by.run(lambda: answers(engine))
        if engine is not None:
            engine.close()
            parts.pop_all()
            bridge.close()
            fresh = engine_for(str(target), **engine_settings)
            found["fresh"] = answers(fresh)
            fresh.close()
    shut_down()
    return found if state.is_main else None


def update_nodes(path: str, bridge_settings: dict, directory: str) -> dict | None:
    """As `update_and_compare`, with an engine on each of two nodes: every rank is the first of a node of its own.

    Between the update and the last answers the other node's engine is killed; then it is killed while it takes weights.
    """
    os.environ["LOCAL_RANK"] = "0"
    state = initialize(ParallelConfig(), device="cpu")
    policy = Policy.build(ModelConfig(path=path), OptimizerConfig(learning_rate=0.02), ParallelConfig(), state)
    found = {}
    with contextlib.ExitStack() as parts:
        agent = None if state.is_main else parts.enter_context(contextlib.closing(NodeAgent(node=str(state.rank))))
        nodes = [address for address in gather_objects(agent and agent.address, state) if address is not None]
        engine = engine_for(path, addresses=nodes, engines=1) if state.is_main else None
        if engine is not None:
            parts.callback(engine.close)
            found["before"] = answers(engine)
        stand_by = StandBy(state)
        bridge = WeightBridge(policy, engine, BridgeConfig(bucket_mib=SMALL, timeout_s=200, **bridge_settings), stand_by)
        parts.callback(bridge.close)
        train(policy, ParallelConfig())
        found["report"] = bridge.push(7)
        if engine is not None:
            found["after"] = answers(engine)
        target = Path(directory) / "exported"
        export(bridge, path, target)
        barrier(state, "the exported checkpoint")
        if agent is not None:
            os.kill(agent.process_ids[-1], signal.SIGKILL)
        found["meanwhile"] = stand_by.run(lambda: answers(engine))
        found["restarted"] = stand_by.run(lambda: answers_of_all(engine))
        if agent is not None:
            killer = threading.Timer(0.02, os.kill, (agent.process_ids[-1], signal.SIGKILL))
            killer.start()
        began = time.monotonic()
        bridge.push(8)
        found["killed, seconds"], found["killed"] = time.monotonic() - began, stand_by.run(lambda: answers(engine))
        if engine is not None:
            engine.close()
            fresh = engine_for(str(target))
            found["fresh"] = answers(fresh)
            fresh.close()
        barrier(state, "the end")
        found["left"] = gather_objects(agent and [pid for pid in agent.process_ids if Path(f"/proc/{pid}").exists()], state)
    shut_down()
    return found if state.is_main else None


def sleep_and_wake(path: str, directory: str) -> dict:
    """What two engines say around two sleeps, in the second of which the first dies; and what ``sleep: kv`` says on CPU."""
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    state = initialize(ParallelConfig(), device="cpu")
    policy = Policy.build(ModelConfig(path=path), OptimizerConfig(learning_rate=0.02), ParallelConfig(), state)
    found, logs = {}, Path(directory)
    engine = engine_for(path, engines=2, sleep="all", block_size=32, logs=logs)
    bridge = WeightBridge(policy, engine, BridgeConfig(bucket_mib=SMALL), StandBy(state))
    cached = lambda: [group.rollouts[0].cached for group in engine.generate(prompts(6), GREEDY, round_index=0)]  # noqa: E731
    bridge.push(1)
    found["answers"] = answers(engine)
    cached()
    found["cached, awake"] = cached()
    engine.sleep()
    try:
        answers(engine)
    except RolloutError as error:
        found["asked"] = str(error)
    bridge.push(1)
    found["cached, woken"], found["woken"] = cached(), answers(engine)
    engine.sleep()
    first = engine.process_ids
    os.kill(first[0], signal.SIGKILL)
    time.sleep(2)
    found["dead meanwhile"] = [process.running for process in engine._processes]
    train(policy, ParallelConfig())
    bridge.push(2)
    found["replaced"] = [new != old for new, old in zip(engine.process_ids, first, strict=True)]
    found["trained"] = answers(engine)
    bridge.push(3)
    found["trained, again"] = answers(engine)
    found["log"] = (logs / "engine-1.log").read_text()
    engine.close()
    bridge.close()
    engine = engine_for(path, sleep="kv")
    answers(engine)
    try:
        engine.sleep()
    except RolloutError as error:
        found["kv"] = str(error)
    engine.close()
    shut_down()
    return found


def corrupt_and_recover(path: str, engines: int) -> dict:
    """Messages of updates that go wrong in transit, of a generation after one, and answers after good updates.

    The last engine dies in the middle of the last update.
    """
    parallel = ParallelConfig()
    state = initialize(parallel, device="cpu")
    policy = Policy.build(ModelConfig(path=path), OptimizerConfig(learning_rate=0.02), parallel, state)
    engine = engine_for(path, engines=engines)
    bridge = WeightBridge(policy, engine, BridgeConfig(bucket_mib=SMALL, timeout_s=200), StandBy(state))
    train(policy, parallel)
    real, send, found, plans = engine.collective_rpc, SharedFile.move, {}, []

    def flip_a_bit(medium, number, size):
        if number == 3:
            medium.slot(number)[40] ^= 4  # of the bucket's first tensor
        send(medium, number, size)

    def leave_one_out(method, *arguments):
        if method == "pmpo_receive_weights":
            *turns, [(lane, bucket)] = arguments[0]["turns"]
            arguments = (arguments[0] | {"turns": [*turns, [(lane, bucket[:-1])]]},)
        return real(method, *arguments)

    for name in ("flipped", "left_out"):
        SharedFile.move = flip_a_bit if name == "flipped" else send
        engine.collective_rpc = leave_one_out if name == "left_out" else real
        try:
            bridge.push(1)
        except WeightSyncError as error:
            found[name] = str(error)
        try:
            answers(engine)
        except RolloutError as error:
            found[f"{name}, generate"] = str(error)

    def note_the_plan(method, *arguments):
        plans.extend(each["turns"] for each in arguments)
        return real(method, *arguments)

    engine.collective_rpc = note_the_plan
    bridge.push(2)
    engine.collective_rpc = real
    found["third"] = title(plans[0][3][0][1][0])
    found["answers"], found["version"] = answers(engine), engine.version
    first = engine.process_ids[-1]

    def kill(medium, number, size):
        send(medium, number, size)
        if number == 3 and engine.process_ids[-1] == first:
            os.kill(first, signal.SIGKILL)

    SharedFile.move = kill
    began = time.monotonic()
    bridge.push(3)
    found["killed, seconds"] = time.monotonic() - began
    found["killed"], found["killed, version"] = answers(engine), engine.version
    assert engine.process_ids[-1] != first
    engine.close()
    bridge.close()
    shut_down()
    return found
