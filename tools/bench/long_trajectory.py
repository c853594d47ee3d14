"""Cost per token as trajectories grow: one trajectory of 1k to 64k tokens, a tiny model on CPU, context parallelism 1 and 2.

Every length runs in fresh processes, so that peak memory is its own. Columns, in microseconds for each token: decoder
(forward), log-probs (forward), objective, and the whole optimizer step (forward, objective, backward, update); attention's
share grows with the length, everything else should stay flat. Memory: the largest process's peak above its start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("decoder", "log_probs", "objective", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << n for n in range(10, 17)], help="tokens")
    parser.add_argument("--context", type=int, nargs="+", default=[1, 2], help="context-parallel sizes")
    parser.add_argument("--plot", type=Path, help="also write this SVG")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(**options.worker)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory) / "model")
        print(f"{'tokens':>7} {'CP':>3} " + " ".join(f"{phase:>10}" for phase in PHASES) + f" {'peak MiB':>9}", flush=True)
        for length in options.lengths:
            for context in options.context:
                row = measure(Path(directory), length, context)
                rows.append(row)
                numbers = " ".join(f"{row[phase] / length * 1e6:10.1f}" for phase in PHASES)
                print(f"{length:7d} {context:3d} {numbers} {row['peak'] / 2**20:9.0f}", flush=True)
    if options.plot:
        plot(rows, options.plot)


def make_model(directory: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.tiny_models import save_tiny_model

    sizes = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=192, num_hidden_layers=2)
    save_tiny_model("qwen2", directory, vocab_size=32000, max_position_embeddings=1 << 17, **sizes)


def measure(directory: Path, length: int, context: int) -> dict:
    """One length on ``context`` processes; the slowest process's seconds and the largest peak."""
    job = json.dumps({"model": str(directory / "model"), "length": length, "context": context, "out": str(directory / "out")})
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={context}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=str(ROOT))
    done = subprocess.run([*command, __file__, "--worker", job], env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    parts = [json.loads((directory / f"out{rank}").read_text()) for rank in range(context)]
    return {"length": length, "context": context} | {key: max(part[key] for part in parts) for key in parts[0]}


def work(model: str, length: int, context: int, out: str) -> None:
    import torch

    from pmpo_megatron.algo.objective import PRESETS
    from pmpo_megatron.model.optimizer import OptimizerConfig
    from pmpo_megatron.model.policy import ModelConfig, Policy
    from pmpo_megatron.model.step import optimizer_step, score
    from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down

    parallel = ParallelConfig(context=context)
    state = initialize(parallel, device="cpu")
    policy = Policy.build(ModelConfig(path=model, recompute="full"), OptimizerConfig(learning_rate=1e-4), parallel, state)
    warm, batch = [one_trajectory(512)], [one_trajectory(length)]
    settings = dict(objective=PRESETS["pmpo"], progress=0.0, temperature=1.0)
    optimizer_step(policy, warm, score(policy, warm, temperature=1.0), **settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = {"decoder": 0.0, "log_probs": 0.0}
    hooks = timers(policy.modules[0], spent)
    old = score(policy, batch, temperature=1.0)
    for hook in hooks:
        hook()
    started = time.perf_counter()
    optimizer_step(policy, batch, old, **settings)
    spent["step"] = time.perf_counter() - started
    spent["objective"] = time_objective(length, torch)
    spent["peak"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    Path(f"{out}{state.rank}").write_text(json.dumps(spent))
    shut_down()


def one_trajectory(length: int):
    import numpy as np

    from pmpo_megatron.data.packing import make_micro_batch
    from pmpo_megatron.types import Sample

    rng = np.random.default_rng(0)
    ids = tuple(rng.integers(0, 32000, length).tolist())
    log_probs = np.full(length - 16, -10.0, dtype=np.float32)
    sample = Sample(0, 0, ids[:16], ids[16:], log_probs, False, 1.0, 1.0, 1.0, 0)
    return make_micro_batch([sample], 16, 0)


def timers(module, spent: dict[str, float]) -> list:
    """Adds the time in the decoder and in the output layer (log-probs) to ``spent``; returns what undoes it."""
    undo = []
    for part, name in ((module.decoder, "decoder"), (module.output_layer, "log_probs")):
        original = part.forward

        def timed(*args, original=original, name=name, **kwargs):
            started = time.perf_counter()
            result = original(*args, **kwargs)
            spent[name] += time.perf_counter() - started
            return result

        part.forward = timed
        undo.append(lambda part=part, original=original: setattr(part, "forward", original))
    return undo


def time_objective(length: int, torch) -> float:
    from pmpo_megatron.algo.objective import PRESETS, evaluate_objective

    log_probs = torch.randn(length, requires_grad=True)
    inputs = (torch.randn(length), torch.zeros(length, dtype=torch.int64), torch.ones(1), torch.ones(1), PRESETS["pmpo"])
    started = time.perf_counter()
    evaluate_objective(log_probs, *inputs).surrogate.backward()
    return time.perf_counter() - started


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for context, style in zip(sorted({row["context"] for row in rows}), ("-", "--", ":"), strict=False):
        chosen = [row for row in rows if row["context"] == context]
        lengths = [row["length"] for row in chosen]
        for index, phase in enumerate(PHASES):
            values = [row[phase] / row["length"] * 1e6 for row in chosen]
            left.plot(lengths, values, style, color=f"C{index}", marker="o", markersize=3, label=f"{phase}, CP {context}")
        right.plot(
            lengths, [row["peak"] / 2**20 for row in chosen], style, color="k", marker="o", markersize=3, label=f"CP {context}"
        )
    for axes, label in ((left, "microseconds / token"), (right, "peak MiB of a process")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the trajectory", ylabel=label)
        axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
