"""What the processes of the GPU tests run."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from pmpo_megatron.algo.objective import PRESETS
from pmpo_megatron.bridge.config import BridgeConfig
from pmpo_megatron.bridge.media import Broadcast, join_medium
from pmpo_megatron.bridge.sync import WeightBridge
from pmpo_megatron.model import architecture
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel.stand_by import StandBy
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from pmpo_megatron.rollout.config import RolloutConfig
from pmpo_megatron.rollout.factory import make_engine
from pmpo_megatron.units import GIB
from tests.distributed.parity_worker import TEMPERATURE, prepared
from tests.integration.engine_worker import EXTENSION, answers, export
from tests.integration.engine_worker import train as update


def train(path: str, layout: dict, dtype: str, *, own_layers: bool = False) -> dict:
    """Two steps on the parity tests' micro-batches; losses, gradient norms, which layers, types and backends.

    Args:
        own_layers: our layers on SDPA also where there is Transformer Engine.
    """
    parallel = ParallelConfig(**layout)
    state = initialize(parallel, device="cuda")
    policy = Policy.build(
        ModelConfig(path=path, dtype=dtype, log_prob_chunk=16, layers="local" if own_layers else "auto"),
        OptimizerConfig(learning_rate=1e-3),
        parallel,
        state,
    )
    scored = score(policy, prepared(state), temperature=TEMPERATURE)
    settings = dict(objective=PRESETS["pmpo"], progress=0.0, temperature=TEMPERATURE)
    results = [optimizer_step(policy, scored, **settings) for _ in range(2)]
    found = {
        "first": results[0].trajectories,
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "applied": all(result.applied for result in results),
        "transformer_engine": not own_layers and architecture.transformer_engine_available(),
        "backends": [dist.get_backend(group) for group in (state.dp_group, state.cp_group, state.control_group)],
        "dtypes": sorted({str(parameter.dtype) for _, parameter in policy.named_parameters()}),
        "main_gradients": sorted({str(parameter.main_grad.dtype) for _, parameter in policy.named_parameters()}),
    }
    if state.is_last_stage and state.cp_size == 1:
        found["log_probs"] = scored[0].old_log_probs_T.cpu().numpy()
    shut_down()
    return found


def train_own_layers(path: str, layout: dict, dtype: str) -> dict:
    return train(path, layout, dtype, own_layers=True)


def sleep_and_wake(path: str, mode: str) -> dict:
    """Answers of a real engine before and after it slept while the weights stayed the same, and the GiB freed meanwhile."""
    state = initialize(ParallelConfig(), device="cuda")
    config = RolloutConfig(kv_cache_gib=1.0, gpu_memory_utilization=0.1, max_num_seqs=32, max_model_len=256, sleep=mode)
    engine = make_engine(config, model_path=path, device="cuda", worker_extension=EXTENSION)
    policy = Policy.build(ModelConfig(path=path), OptimizerConfig(), ParallelConfig(), state)
    bridge = WeightBridge(policy, engine, BridgeConfig(), StandBy(state))
    bridge.push(1)
    found: dict = {"free": [], "answers": [answers(engine)]}
    for version in (2, 3):
        before = torch.cuda.mem_get_info()[0]
        engine.sleep()
        found["free"].append((torch.cuda.mem_get_info()[0] - before) / GIB)
        bridge.push(version)
        found["answers"].append(answers(engine))
    engine.close()
    bridge.close()
    shut_down()
    return found


def update_in_fp8(path: str, directory: str) -> dict:
    """Answers of an engine in fp8 before and after an update, and of one loaded from the exported checkpoint."""
    state = initialize(ParallelConfig(), device="cuda")
    settings = dict(kv_cache_gib=0.5, gpu_memory_utilization=0.1, max_num_seqs=32, max_model_len=256, quantization="fp8")
    common = dict(device="cuda", worker_extension=EXTENSION)
    engine = make_engine(RolloutConfig(**settings), model_path=path, **common)
    policy = Policy.build(ModelConfig(path=path), OptimizerConfig(learning_rate=0.02), ParallelConfig(), state)
    bridge = WeightBridge(policy, engine, BridgeConfig(), StandBy(state))
    found = {"before": answers(engine)}
    update(policy, ParallelConfig())
    bridge.push(1)
    found["after"] = answers(engine)
    export(bridge, path, Path(directory) / "exported")
    engine.close()
    bridge.close()
    fresh = make_engine(RolloutConfig(**settings), model_path=str(Path(directory) / "exported"), **common)
    found["fresh"] = answers(fresh)
    fresh.close()
    shut_down()
    return found


def connect_and_hang(port: int, common: dict) -> None:
    """The second rank of a broadcast by NCCL, on the second GPU: connects, and takes part in nothing more."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    Broadcast("nccl", rank=1, store=store, device=torch.device("cuda", 1), **common).connect()
    time.sleep(600)


def add_one(description: dict) -> None:
    """The second slot becomes the first plus one, in memory of another process on this GPU."""
    device = torch.device("cuda", 0)
    medium = join_medium(description, store=dist.HashStore(), device=device)
    medium.slot(1).copy_(medium.slot(0) + 1)
    torch.cuda.synchronize()
