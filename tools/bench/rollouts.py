"""Who waits for whom: share of time that trainer and engines wait, and trajectories per minute, in each round.mode; and
what a queue saves against a division of prompts where one engine is slower.

    python tools/bench/rollouts.py modes --config examples/quickstart/config.yaml        # real runs, one after another
    python tools/bench/rollouts.py sharing                                               # two real vLLMs of one thread each

`modes` starts whole runs; what follows the options overrides their configuration. An engine waits while it uses no
processor, which is what this counts: on a CPU with a core for each engine. `sharing` gives log-normal lengths, and slows
one engine by stopping and continuing it in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from pmpo_megatron.hf.tiny_model import make_tokenizer
from pmpo_megatron.rollout import vllm_jobs
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.factory import make_engine
from pmpo_megatron.rollout.vllm_jobs import request_parameters
from pmpo_megatron.types import Prompt

MODES = ("synchronous", "overlapped", "in_flight")
TURN_S = 0.02  # of a slowed engine


def engine_seconds(process: psutil.Process) -> float:
    """Processor time of the vLLMs below ``process``: the children of its fork server."""
    servers = [child for child in process.children(recursive=True) if "vllm_preload" in " ".join(child.cmdline())]
    below = {engine.pid: engine for server in servers for engine in server.children(recursive=True)}
    return sum(sum(engine.cpu_times()[:2]) for engine in below.values())


def read_rounds(directory: Path) -> list[dict]:
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]  # the last line may be half written
    return [row for row in rows if "time/total_s" in row]


def run_mode(mode: str, options: argparse.Namespace, directory: Path) -> dict[str, float]:
    """What a run of ``options.rounds`` rounds shows after the first ``options.skip``."""
    command = [sys.executable, "-W", "ignore", "-m", "pmpo_megatron.commands.train", "--config", str(options.config)]
    command += [f"run.directory={directory}", f"run.rounds={options.rounds}", f"round.mode={mode}", "evaluation.data=null"]
    command += ["objective.importance=token", "monitor.progress=line", *options.overrides]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    used: dict[int, tuple[float, float]] = {}  # by rounds done: the clock, processor time of the engines
    while process.poll() is None:
        done = len(read_rounds(directory))
        if done not in used:
            used[done] = (time.monotonic(), engine_seconds(process))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    rounds = read_rounds(directory)[options.skip :]
    seconds = sum(row["time/total_s"] for row in rounds)
    (began, first), (ended, last) = used[options.skip], used[max(used)]
    engines = next((int(each.split("=")[1]) for each in options.overrides if each.startswith("rollout.engines=")), 1)
    return {
        "trajectories per minute": 60 * options.trajectories * len(rounds) / seconds,
        "trainer waits": sum(row["time/rollouts_s"] for row in rounds) / seconds,
        "engines wait": 1 - (last - first) / (ended - began) / engines,
    }


def compare_modes(options: argparse.Namespace) -> None:
    for mode in options.modes:
        with tempfile.TemporaryDirectory() as directory:
            found = run_mode(mode, options, Path(directory) / "run")
        print(f"{mode:12} " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)


class Slowed:
    """While it lasts, ``process_id`` runs 1 / ``factor`` of the time."""

    def __init__(self, process_id: int, factor: float) -> None:
        self._process_id, self._factor, self._over = process_id, factor, threading.Event()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while self._factor > 1 and not self._over.wait(TURN_S):
            os.kill(self._process_id, signal.SIGSTOP)
            time.sleep(TURN_S * (self._factor - 1))
            os.kill(self._process_id, signal.SIGCONT)


def make_jobs(seed: int, prompts: int, samples: int) -> list[tuple[Prompt, SamplingConfig]]:
    """Prompts whose responses have log-normal lengths; those of a prompt are alike."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(240, 40 * rng.lognormal(0, 0.9, prompts)).astype(int) + 1
    base = SamplingConfig(samples_per_prompt=samples)
    made = []
    for index, length in enumerate(lengths):
        token_ids = rng.integers(2, 80, 8).astype(np.int32)
        made.append((Prompt(index, token_ids, "", ()), replace(base, max_tokens=int(length))))
    return made


def round_seconds(engines: list, jobs: list[tuple[Prompt, SamplingConfig]]) -> float:
    """All of ``jobs``: prompt k to engine k modulo their number; one engine shares them out itself."""
    began = time.monotonic()
    futures = [engines[n % len(engines)].submit([job[0]], job[1], round_index=0) for n, job in enumerate(jobs)]
    wait([future for [future] in futures])
    return time.monotonic() - began


def compare_sharing(options: argparse.Namespace) -> None:
    from tests.tiny_models import save_tiny_model

    vllm_jobs.request_parameters = lambda sampling: request_parameters(sampling) | {"ignore_eos": True}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = make_tokenizer()
        sizes = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
        save_tiny_model("qwen2", Path(directory), vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
        tokenizer.save_pretrained(directory)
        config = RolloutConfig(threads=1, kv_cache_gib=0.2, max_num_seqs=options.slots)
        common = dict(model_path=directory, device="cpu", worker_extension=None)
        apart = [make_engine(config, **common) for _ in range(2)]
        together = make_engine(replace(config, engines=2), **common)
        for factor in options.slower:
            ratios = []
            for seed in range(options.seeds):
                jobs = make_jobs(seed, options.prompts, 8)
                with Slowed(apart[1].process_ids[0], factor):
                    divided = round_seconds(apart, jobs)
                with Slowed(together.process_ids[1], factor):
                    ratios.append(divided / round_seconds([together], jobs))
            print(
                f"one engine {factor:g} times slower: division / queue {statistics.mean(ratios):.2f} "
                f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
                flush=True,
            )
        for engine in (*apart, together):
            engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    modes = commands.add_parser("modes")
    modes.add_argument("--config", type=Path, required=True)
    modes.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    modes.add_argument("--rounds", type=int, default=10)
    modes.add_argument("--skip", type=int, default=2, help="rounds at the beginning (default: %(default)s)")
    modes.add_argument("--trajectories", type=int, required=True, help="of a round")
    modes.add_argument("overrides", nargs="*", metavar="section.key=value")
    sharing = commands.add_parser("sharing")
    sharing.add_argument("--slower", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    sharing.add_argument("--prompts", type=int, default=48, help="of a round, of 8 responses each (default: %(default)s)")
    sharing.add_argument("--slots", type=int, default=32, help="requests at once in each engine (default: %(default)s)")
    sharing.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    compare_modes(options) if options.command == "modes" else compare_sharing(options)


if __name__ == "__main__":
    main()
