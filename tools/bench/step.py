#!/usr/bin/env python
"""Tokens per second of scoring and of an optimizer step (forward, objective, backward, update), and their peak memory.

A checkpoint of random weights in the chosen shape is written first, or --model names one. Every process gets the same
micro-batches of packed trajectories; the first step, which allocates, is not counted. TFLOP/s counts 6 operations for each
    from pmpo_megatron.planner import hardware_here
    from pmpo_megatron.planner.parameters import active_parameters
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pmpo_megatron.hf.known_models import known_config

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(
    known_config("Qwen/Qwen2.5-7B"),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
)
TINY_MOE = known_config("Qwen/Qwen3-30B-A3B") | TINY | {"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 32}
TINY_MOE |= {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
SIZES = {"tiny": TINY, "tiny-moe": TINY_MOE} | {size: known_config(f"Qwen/Qwen2.5-{size}") for size in ("0.5B", "1.5B", "7B")}
LAYOUT = {"tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "expert_tensor": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="shape of a model of random weights (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help="Hugging Face directory in place of --size")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--trajectory", type=int, default=1024, help="tokens of each trajectory")
    parser.add_argument("--trajectories", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step, on each data-parallel rank")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    for name, default in LAYOUT.items():
        option = name.replace("_", "-")
        parser.add_argument(f"--{option}", type=int, default=default, help=f"{option}-parallel size (default: %(default)s)")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        return work(options)
    with tempfile.TemporaryDirectory() as directory:
        if options.model is None:
            options.model = Path(directory) / "model"
            make_model(options.model, options.size)
        report(launch(options, Path(directory)))


def make_model(directory: Path, size: str) -> None:
    """Weights as an initialisation has them: matrices of std 0.02, norms of 1."""
    from pmpo_megatron.convert.hugging_face import SafetensorsStream
    from pmpo_megatron.hf.mapping import WeightMapping
    from pmpo_megatron.hf.shape import shape_of

    config = SIZES[size] | {"max_position_embeddings": 1 << 17}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = WeightMapping(shape_of(config)).hf_shapes
    stream = SafetensorsStream(directory, [(n, torch.bfloat16, s) for n, s in shapes.items()], shard_bytes=4 << 30)
    for name, shape in shapes.items():
        weights = torch.ones(shape) if "norm" in name else torch.randn(shape).mul_(0.02)
        stream.add(name, weights.bfloat16())
    stream.finish()


def launch(options: argparse.Namespace, directory: Path) -> list[dict]:
    """Runs `work` in every process; what each found."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", __file__]
    command[-1:-1] = [f"--nproc-per-node={options.processes}"]
    for name, value in vars(options).items():
        if value is not None and value is not False and name != "out":
            command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = dict(os.environ, PYTHONPATH=paths)
    done = subprocess.run([*command, "--out", str(directory)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [json.loads((directory / f"rank{rank}").read_text()) for rank in range(options.processes)]


def report(ranks: list[dict]) -> None:
    one = ranks[0]
    print(f"{one['layout']}, {one['dtype']}, {one['layers']}, {one['parameters'] / 1e9:.3f}e9 parameters for a token")
    print(f"{one['tokens']} tokens in a step; median of {len(one['step'])} steps, the slowest process's")
    print(f"{'':>6} {'seconds':>9} {'tokens/s':>10}")
    seconds = {name: max(statistics.median(rank[name]) for rank in ranks) for name in ("score", "step")}
    for name, value in seconds.items():
        print(f"{name:>6} {value:>9.3f} {one['tokens'] / value:>10.0f}")
    rate = 6 * one["parameters"] * one["tokens"] / seconds["step"] / len(ranks)
    share = f" (MFU {rate / one['peak_flops']:.1%})" if one["peak_flops"] else ""
    planned, peak = (max(rank[name] for rank in ranks) / 2**30 for name in ("planned", "peak"))
    print(f"{rate / 1e12:.3f} TFLOP/s for each process{share}; planned {planned:.2f} GiB; peak memory {peak:.2f} GiB")


def work(options: argparse.Namespace) -> None:
    from pmpo_megatron.algo.objective import PRESETS
    from pmpo_megatron.model.architecture import transformer_engine_available
    from pmpo_megatron.model.micro_batch import prepare
    from pmpo_megatron.model.optimizer import OptimizerConfig
    from pmpo_megatron.model.policy import ModelConfig, Policy
    from pmpo_megatron.model.step import optimizer_step, score
    from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
    from pmpo_megatron.planner import hardware_here
    from pmpo_megatron.planner.parameters import active_parameters

    layout = {name: getattr(options, name) for name in LAYOUT}
    parallel = ParallelConfig(**layout, sequence_parallel=options.sequence_parallel)
    state = initialize(parallel, device=options.device)
    model = ModelConfig(path=str(options.model), dtype=options.dtype, recompute=options.recompute)
    policy = Policy.build(model, OptimizerConfig(), parallel, state)
    packed = [pack_trajectories(options, policy.shape.vocab_size, index) for index in range(options.micro_batches)]
    batches = [prepare(each, state) for each in packed]
    found = {"score": [], "step": []}
    for _ in range(options.steps + 1):
        scored = timed(found["score"], state.device, lambda: score(policy, batches, temperature=1.0))
        settings = dict(objective=PRESETS["pmpo"], progress=0.0, temperature=1.0)
        result = timed(found["step"], state.device, lambda scored=scored, s=settings: optimizer_step(policy, scored, **s))
        if not result.applied:
            raise SystemExit(f"a step failed: {result.problem}")
    found = {name: seconds[1:] for name, seconds in found.items()}
    on_gpu = state.device.type == "cuda"
    found |= {
        "layout": state.describe(),
        "dtype": str(model.torch_dtype(state.device)).removeprefix("torch."),
        "layers": "Transformer Engine" if transformer_engine_available() else "own layers (SDPA)",
        "parameters": active_parameters(policy.shape),
        "tokens": options.trajectory * options.trajectories * options.micro_batches * state.dp_size,
        "peak_flops": hardware_here().peak_flops if on_gpu else None,
        "planned": planned_bytes(options, policy, model),
        "peak": torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    (options.out / f"rank{state.rank}").write_text(json.dumps(found))
    shut_down()


def planned_bytes(options: argparse.Namespace, policy, model) -> float:
    """What the planner counts for this rank: parameters, gradients, optimizer and activations."""
    from pmpo_megatron.model.architecture import expects_fused
    from pmpo_megatron.planner.activations import ActivationModel, activation_bytes
    from pmpo_megatron.planner.parameters import state_bytes
    from pmpo_megatron.units import ITEM_SIZE, resolve_dtype

    state, dtype = policy.state, resolve_dtype(options.dtype, policy.state.device.type)
    fixed = state_bytes(policy.shape, state.config, stage=state.pp_rank, replicas=state.dp_size * state.cp_size, dtype=dtype)
    fused = expects_fused(model.layers) and state.device.type == "cuda"
    activations = activation_bytes(
        ActivationModel(policy.shape, state.config, options.recompute, ITEM_SIZE[dtype], fused=fused),
        tokens=options.trajectory * options.trajectories / state.cp_size,
        stage=state.pp_rank,
        micro_batches=options.micro_batches,
        chunk=model.log_prob_chunk,
    )
    return fixed.total + activations.total


def pack_trajectories(options: argparse.Namespace, vocabulary: int, seed: int):
    import numpy as np

    from pmpo_megatron.data.packing import pack
    from pmpo_megatron.types import Sample

    rng, prompt = np.random.default_rng(seed), min(64, options.trajectory // 2)
    samples = []
    for index in range(options.trajectories):
        ids = rng.integers(0, vocabulary, options.trajectory, dtype=np.int32)
        log_probs = np.full(len(ids) - prompt, -10.0, dtype=np.float32)
        samples.append(Sample(index, 0, ids[:prompt], ids[prompt:], log_probs, False, 1.0 if index % 2 else -1.0))
    return pack(samples, [1e-3] * len(samples), sequence_multiple=2 * options.context * options.tensor)


def timed(seconds: list[float], device: torch.device, action):
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
    return result


if __name__ == "__main__":
    main()
