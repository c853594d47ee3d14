"""Seconds to bring a rollout engine to new weights: the bridge, export to disk and reload, and a plain copy of the bytes.

A 0.5B-shaped model of random weights, Megatron on one process and real vLLM, all in one run. Aims: the bridge is at least
5 times faster than disk and takes at most 3 times the copy.
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
from pmpo_megatron.bridge.sync import WeightBridge
from pmpo_megatron.hf.known_models import COLUMNS, known_config
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.parallel.stand_by import StandBy
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
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
    parser.add_argument("--tensor-parallel", type=int, default=1, help="of vLLM (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="updates timed; the median counts (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    rank_environment()
    parallel = ParallelConfig()
    state = initialize(parallel, device=options.device)
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(Path(directory), options.dtype, options.layers)
        policy = Policy.build(ModelConfig(path=directory, dtype=options.dtype), None, parallel, state)
        rollout = RolloutConfig(tensor_parallel=options.tensor_parallel, dtype=options.dtype, kv_cache_gib=0.1, threads=1)
        engine = make_engine(rollout, model_path=directory, device=options.device, worker_extension=EXTENSION)
        rows, size = [], 0
        for name, settings in {
            "bridge, every byte verified": dict(verify="full"),
            "bridge, samples verified": dict(verify="sample"),
            "bridge, not verified": dict(verify="off"),
            "bridge over gloo, every byte": dict(transport="gloo"),
            "export to disk and reload": dict(transport="disk", verify="off", directory=directory),
        }.items():
            bridge = WeightBridge(policy, engine, BridgeConfig(**settings), StandBy(state))
            reports = [bridge.push(1) for _ in range(options.repeats + 2)][2:]  # the first ones grow vLLM's memory
            rows.append(
                (name, *(statistics.median(values) for values in zip(*((r.seconds, r.waited_s) for r in reports), strict=True)))
            )
            size = reports[0].bytes
            bridge.close()
        rows.append(("plain copy of the bytes", copy_time(size, options.repeats, options.device), 0.0))
        engine.close()
    shut_down()
    report(rows, size, options)


def report(rows: list[tuple[str, float, float]], size: int, options: argparse.Namespace) -> None:
    (_, bridge, waited), (_, disk, _), (_, copy, _) = rows[0], rows[-2], rows[-1]
    print(f"\n{size / 1e9:.2f} GB, {options.dtype}, vLLM TP{options.tensor_parallel}, {os.cpu_count()} cores")
    for name, value, idle in rows:
        note = f"  of it {idle:.3f} s waiting for weights, else loading them" if idle else ""
        print(f"{name:32} {value:8.3f} s {size / value / 1e9:8.2f} GB/s{note}")
    print(f"disk / bridge: {disk / bridge:.1f} (aim: at least 5), bridge / copy: {bridge / copy:.1f} (aim: at most 3)")
    print(f"what the engine waits for weights / copy: {waited / copy:.1f}")


if __name__ == "__main__":
    main()
