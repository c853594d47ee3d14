"""Cost per token as trajectories grow: one trajectory of 1k to 64k tokens, a tiny model on CPU, context parallelism 1 and 2.

Every length runs in fresh processes. The parts of an optimizer step, in microseconds of the slowest process for each token of
the trajectory: attention (the core alone: forward, again in recomputation, backward), forward (the rest of the decoder),
log-probs (output layer, forward), objective (p and the surrogate), backward (all of it but attention). Attention's share grows
with the length; everything else should stay flat. Memory: what the largest process held at most during each part, above what
it held before the step.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("attention", "forward", "log_probs", "objective", "backward")
MEMORY = PARTS[1:]
REPEATED_UP_TO = 8192  # tokens: shorter steps are run three times, and each part's fastest counts


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
        print(f"{'':11} microseconds / token{'':46} peak MiB")
        print(f"{'tokens':>7} {'CP':>3} " + " ".join(f"{name:>9}" for name in (*PARTS, "flat part", *MEMORY)), flush=True)
        for context in options.context:
            for length in options.lengths:
                rows.append(row := measure(Path(directory), length, context))
                times = " ".join(f"{us:9.1f}" for us in (*per_token(row).values(), flat_part(row)))
                peaks = " ".join(f"{row[f'{part} bytes'] / 2**20:9.1f}" for part in MEMORY)
                print(f"{length:7d} {context:3d} {times} {peaks}", flush=True)
    if options.plot:
        plot(rows, options.plot)


def per_token(row: dict) -> dict[str, float]:
    return {part: row[part] / row["length"] * 1e6 for part in PARTS}


def flat_part(row: dict) -> float:
    """Microseconds per token of everything but attention."""
    return sum(us for part, us in per_token(row).items() if part != "attention")


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
    from pmpo_megatron.algo.objective import PRESETS
    from pmpo_megatron.model.micro_batch import prepare
    from pmpo_megatron.model.optimizer import OptimizerConfig
    from pmpo_megatron.model.policy import ModelConfig, Policy
    from pmpo_megatron.model.step import optimizer_step, score
    from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down

    parallel = ParallelConfig(context=context)
    state = initialize(parallel, device="cpu")
    policy = Policy.build(ModelConfig(path=model, recompute="full"), OptimizerConfig(learning_rate=1e-4), parallel, state)
    warm, batch = ([prepare(one_trajectory(size), state)] for size in (512, length))
    settings = dict(objective=PRESETS["pmpo"], progress=0.0, temperature=1.0)
    optimizer_step(policy, score(policy, warm, temperature=1.0), **settings)
    scored = score(policy, batch, temperature=1.0)
    meter = Meter()
    instrument(policy.modules[0], meter)
    found = []
    for _ in range(3 if length <= REPEATED_UP_TO else 1):
        meter.start()
        optimizer_step(policy, scored, **settings)
        found.append(meter.result())
    best = {name: (max if name.endswith("bytes") else min)(result[name] for result in found) for name in found[0]}
    Path(f"{out}{state.rank}").write_text(json.dumps(best))
    shut_down()


class Meter:
    """Seconds and peak memory of the parts of a step. A part lasts until the next begins; attention lies inside others."""

    def start(self) -> None:
        self.seconds = dict.fromkeys((*PARTS, "update"), 0.0)
        self.peaks = dict.fromkeys((*MEMORY, "update"), 0)
        self.inside = dict.fromkeys(self.seconds, 0.0)  # attention's seconds within the part
        give_back_freed_memory()
        self.part, self.since, self.before = None, 0.0, memory("VmRSS")

    def begin(self, part: str | None) -> None:
        now = time.perf_counter()
        if self.part is not None:
            self.seconds[self.part] += now - self.since
            self.peaks[self.part] = max(self.peaks[self.part], memory("VmHWM") - self.before)
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.part, self.since = part, time.perf_counter()

    def add_attention(self, seconds: float) -> None:
        self.seconds["attention"] += seconds
        self.inside[self.part] += seconds

    def result(self) -> dict[str, float]:
        self.begin(None)
        seconds = {part: self.seconds[part] - self.inside[part] for part in PARTS}
        return seconds | {f"{part} bytes": self.peaks[part] for part in MEMORY}


def give_back_freed_memory() -> None:
    """To the system, so that what a process holds is what lives in it."""
    ctypes.CDLL(None).malloc_trim(0)


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def instrument(module, meter: Meter) -> None:
    """Parts begin where the decoder, the scoring of its output, the objective, and the optimizer's update are called."""
    from pmpo_megatron.model import policy, step

    def first(part: str, function, *, after: str | None = None):
        def timed(*args, **kwargs):
            meter.begin(part)
            result = function(*args, **kwargs)
            if after:
                meter.begin(after)
            return result

        return timed

    module.decoder.forward = first("forward", module.decoder.forward)
    policy.score_hidden_states = first("log_probs", policy.score_hidden_states)
    step.evaluate_objective = first("objective", step.evaluate_objective, after="backward")
    step.collect_results = first("update", step.collect_results)
    for layer in module.decoder.layers:
        time_attention(layer.self_attention.core_attention, meter)


def time_attention(attention, meter: Meter) -> None:
    started = {}

    def begin(*_) -> None:
        started["at"] = time.perf_counter()

    def end(*_) -> None:
        meter.add_attention(time.perf_counter() - started["at"])

    attention.register_forward_pre_hook(begin)
    attention.register_forward_hook(end)
    attention.register_full_backward_pre_hook(begin)
    attention.register_full_backward_hook(end)


def one_trajectory(length: int):
    import numpy as np

    from pmpo_megatron.data.packing import pack
    from pmpo_megatron.types import Sample

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32000, length, dtype=np.int32)
    log_probs = np.full(length - 16, -10.0, dtype=np.float32)
    return pack([Sample(0, 0, ids[:16], ids[16:], log_probs, False, 1.0)], [1.0], sequence_multiple=16)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "long_trajectory", "svg.fonttype": "none"})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for context, style in zip(sorted({row["context"] for row in rows}), ("-", "--", ":"), strict=False):
        chosen = [row for row in rows if row["context"] == context]
        lengths = [row["length"] for row in chosen]
        for index, part in enumerate(PARTS):
            label = f"{part.replace('_', '-')}, CP {context}"
            line = dict(linestyle=style, color=f"C{index}", marker="o", markersize=3, label=label)
            left.plot(lengths, [per_token(row)[part] for row in chosen], **line)
            if part in MEMORY:
                right.plot(lengths, [row[f"{part} bytes"] / 2**20 for row in chosen], **line)
    for axes, label in ((left, "microseconds / token"), (right, "peak MiB of a process")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the trajectory", ylabel=label)
        axes.legend(fontsize=6)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
