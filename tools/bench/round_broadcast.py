#!/usr/bin/env python
"""How long a round's trajectories take from rank 0 to every rank's prepared micro-batches, and the memory that they take.

All processes run on this machine, each a data-parallel replica. Peak memory is what a process holds at most beyond what it
held before; for rank 0 that is beside the trajectories themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PROMPT = 512  # tokens
GROUP = 16  # trajectories
VOCABULARY = 150_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=1024, help="of a round (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32768, help="of each trajectory (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the fastest counts (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        return work(options)
    with tempfile.TemporaryDirectory() as directory:
        report(options, launch(options, Path(directory)))


def launch(options: argparse.Namespace, directory: Path) -> list[dict]:
    """Runs `work` in every process; what each found."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={options.processes}", __file__, "--out", str(directory)]
    for name in ("trajectories", "tokens", "repeats"):
        command += [f"--{name}", str(getattr(options, name))]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = dict(os.environ, PYTHONPATH=paths, CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [json.loads((directory / f"rank{rank}").read_text()) for rank in range(options.processes)]


def report(options: argparse.Namespace, ranks: list[dict]) -> None:
    tokens = options.trajectories * options.tokens
    seconds = min(max(rank["seconds"][repeat] for rank in ranks) for repeat in range(options.repeats))
    print(f"{options.trajectories} trajectories of {options.tokens} tokens to {options.processes} processes")
    print(f"seconds {seconds:.2f}, {tokens / seconds / 1e6:.1f} million tokens/s")
    print(f"peak MiB: rank 0 {ranks[0]['peak'] / 2**20:.0f} beside {ranks[0]['samples'] / 2**20:.0f} of trajectories", end="")
    print("".join(f", another {max(rank['peak'] for rank in ranks[1:]) / 2**20:.0f}" for _ in ranks[1:2]))


def work(options: argparse.Namespace) -> None:
    from pmpo_megatron.config import build
    from pmpo_megatron.parallel.collectives import barrier, broadcast_object
    from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
    from pmpo_megatron.training.run_config import RunConfig
    from pmpo_megatron.training.shares import share_round
    from pmpo_megatron.types import TrajectoryTable

    config = build(
        RunConfig,
        {
            "model": {"path": "unused"},
            "data": {"source": "arithmetic"},
            "sampling": {"max_tokens": options.tokens, "samples_per_prompt": GROUP},
            "batch": {
                "prompts_per_round": max(1, options.trajectories // GROUP),
                "steps_per_round": 1,
                "max_tokens_per_micro_batch": 2 * options.tokens,
            },
        },
    )
    state = initialize(ParallelConfig(), device="cpu")
    before = memory("VmRSS")
    samples = make_samples(options) if state.is_main else ()
    found = {"samples": memory("VmRSS") - before, "seconds": [], "peak": 0}
    for repeat in range(options.repeats):
        barrier(state, "the start")
        before, started = memory("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        table = broadcast_object(TrajectoryTable.of(samples, [0.0] * len(samples)) if state.is_main else None, state)
        steps = share_round(samples, table, config, state, round_index=repeat)
        barrier(state, "the end")
        found["seconds"].append(time.perf_counter() - started)
        found["peak"] = max(found["peak"], memory("VmHWM") - before)
        del steps, table
    (options.out / f"rank{state.rank}").write_text(json.dumps(found))
    shut_down()


def make_samples(options: argparse.Namespace):
    from pmpo_megatron.types import Sample

    rng, prompt = np.random.default_rng(0), min(PROMPT, options.tokens // 2)
    return [
        Sample(
            sample_id=number,
            group_id=number // GROUP,
            prompt_ids=rng.integers(0, VOCABULARY, prompt, dtype=np.int32),
            response_ids=rng.integers(0, VOCABULARY, options.tokens - prompt, dtype=np.int32),
            rollout_log_probs=np.full(options.tokens - prompt, -1.0, dtype=np.float32),
            truncated=False,
            advantage=1.0,
        )
        for number in range(options.trajectories)
    ]


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
