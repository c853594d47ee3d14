"""Seconds to bring a rollout engine to new weights, beside a plain copy of the bytes; and which rank moves how many of them.

A 0.5B-shaped model of random weights, Megatron and real vLLM. One process, or under torchrun several:
torchrun --nproc_per_node 4 tools/bench/weight_sync.py --tensor 2 --pipeline 2. Aim: beside vLLM's own loading, which every way
shares, an update takes at most 3 plain copies.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pmpo_megatron.bridge.config import BridgeConfig
from pmpo_megatron.bridge.sync import PushReport, WeightBridge
from pmpo_megatron.hf.known_models import COLUMNS, known_config
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.parallel.collectives import barrier, broadcast_object
from pmpo_megatron.parallel.stand_by import StandBy
from pmpo_megatron.parallel.state import ParallelConfig, ParallelState, initialize, shut_down
from pmpo_megatron.rollout.config import RolloutConfig
from pmpo_megatron.rollout.factory import make_engine
from pmpo_megatron.training.launch import rank_environment

SHAPE = known_config("Qwen/Qwen2.5-0.5B")
QWEN_HALF_B = {column: SHAPE[column] for column in COLUMNS} | {"max_position_embeddings": 2048}
EXTENSION = "pmpo_megatron.bridge.vllm_worker.WeightReceiver"


def make_checkpoint(directory: Path, dtype: str, layers: int) -> None:
    """Random weights with the tokenizer of the tiny model, which nothing here uses."""
    import transformers

    from pmpo_megatron.hf.tiny_model import make_tokenizer

    torch.set_default_dtype(getattr(torch, dtype))
    config = transformers.Qwen2Config(**QWEN_HALF_B | {"num_hidden_layers": layers}, dtype=dtype)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    torch.set_default_dtype(torch.float32)
    make_tokenizer().save_pretrained(directory)


def copy_time(size: int, repeats: int, device: str) -> float:
    """Median, after one that warms up."""
    source, target = (torch.ones(size // 8, dtype=torch.int64, device=device) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--layers", type=int, default=QWEN_HALF_B["num_hidden_layers"], help="(default: %(default)s)")
    parser.add_argument("--tensor", type=int, default=1, help="of the trainer (default: %(default)s)")
    parser.add_argument("--pipeline", type=int, default=1, help="of the trainer (default: %(default)s)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="of vLLM (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="updates timed; the median counts (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    rank_environment()
    state = initialize(ParallelConfig(tensor=options.tensor, pipeline=options.pipeline), device=options.device)
    with tempfile.TemporaryDirectory() as made:
        directory = broadcast_object(made, state)
        if state.is_main:
            make_checkpoint(Path(directory), options.dtype, options.layers)
        reports = measure(directory, state, options)
    if state.is_main:
        copy = copy_time(reports["bridge, not verified"][0].bytes, options.repeats, options.device)
        show(reports, copy, state, options)
    shut_down()


def measure(directory: str, state: ParallelState, options: argparse.Namespace) -> dict[str, list[PushReport]]:
    """Of each way of sending, its updates. Collective."""
    engine = None
    if state.is_main:
        rollout = RolloutConfig(tensor_parallel=options.tensor_parallel, dtype=options.dtype, kv_cache_gib=0.1, threads=1)
        engine = make_engine(rollout, model_path=directory, device=options.device, worker_extension=EXTENSION)
    barrier(state, "the engine")
    policy = Policy.build(ModelConfig(path=directory, dtype=options.dtype), None, state.config, state)
    reports = {}
    for name, settings in {
        "bridge, every byte verified": dict(verify="full"),
        "bridge, samples verified": dict(verify="sample"),
        "bridge, not verified": dict(verify="off"),
        "bridge over gloo, every byte": dict(transport="gloo"),
    }.items():
        bridge = WeightBridge(policy, engine, BridgeConfig(**settings), StandBy(state))
        reports[name] = [bridge.push(1) for _ in range(options.repeats + 2)][2:]  # the first ones grow vLLM's memory
        bridge.close()
    if engine is not None:
        engine.close()
    return reports


def show(reports: dict[str, list[PushReport]], copy: float, state: ParallelState, options: argparse.Namespace) -> None:
    first = next(iter(reports.values()))[0]
    print(f"\n{first.bytes / 1e9:.2f} GB, {options.dtype}, vLLM TP{options.tensor_parallel}, {os.cpu_count()} cores")
    print(f"trainer: {state.describe()}")
    for name, pushes in reports.items():
        seconds, waited = statistics.median(r.seconds for r in pushes), statistics.median(r.waited_s for r in pushes)
        print(f"{name:32} {seconds:8.3f} s {first.bytes / seconds / 1e9:8.2f} GB/s", end="")
        print(f"  of it waiting for weights {waited:.3f} s, {waited / copy:.1f} copies; else loading them")
    print(f"{'plain copy of the bytes':32} {copy:8.3f} s {first.bytes / copy / 1e9:8.2f} GB/s")
    for what, amounts in (("handed to workers", first.handed), ("received from other ranks", first.received)):
        print(f"{what + ' by each rank, MB':44} " + "  ".join(f"{amount / 1e6:.0f}" for amount in amounts))


if __name__ == "__main__":
    main()
