"""Who waits for whom: share of time that trainer and engines wait, and trajectories per minute, in each round.mode; what a
round costs; and what a queue saves against a division of prompts where one engine is slower.

    python tools/bench/rollouts.py modes --config examples/quickstart/config.yaml        # real runs, one after another
    python tools/bench/rollouts.py processor --config CONFIG --checkouts . ../before     # real runs, beside each other
    python tools/bench/rollouts.py sharing                                               # two real vLLMs of one thread each

`modes` and `processor` start whole runs; what follows the options overrides their configuration. An engine waits while it
uses no processor, which is what this counts: on a CPU with a core for each engine. `processor` gives the processor's seconds
of a round by part; it runs all checkouts at once, so that what else the machine does meets them alike. `sharing` gives
log-normal lengths, and slows one engine by stopping and continuing it in turns.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from pmpo_megatron.hf.tiny_model import TinyModelConfig, make_model, make_tokenizer
from pmpo_megatron.monitor.jsonl import read_json_lines
from pmpo_megatron.rollout import vllm_jobs
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.factory import make_engine
from pmpo_megatron.rollout.vllm_jobs import request_parameters
from pmpo_megatron.types import Prompt

TRAIN = "pmpo_megatron.commands.train"
MODES = ("synchronous", "overlapped", "in_flight")
TURN_S = 0.02  # of a slowed engine


class Run:
    """A run of the trainer, and what processor time its parts have used when each round is done."""

    def __init__(self, options: argparse.Namespace, directory: str, *settings: str, checkout: str = ".") -> None:
        self.directory = Path(directory) / "run"
        where, _, module = checkout.partition(":")
        command = [sys.executable, "-W", "ignore", "-m", module or TRAIN, "--config", str(options.config.resolve())]
        command += [f"run.directory={self.directory}", f"run.rounds={options.rounds}", "evaluation.data=null", *settings]
        env = os.environ | {"PYTHONPATH": str(Path(where).resolve())}
        self._process = psutil.Popen([*command, *options.overrides], cwd=where, env=env, stdout=subprocess.DEVNULL)
        self.used: dict[int, tuple[float, dict[str, float]]] = {}  # by rounds done: the clock, seconds

    def watch(self) -> bool:
        """Looks once; False if the run is over.

        Raises:
            SystemExit: it failed.
        """
        over = self._process.poll() is not None
        if over and self._process.returncode:
            raise SystemExit(f"the run failed with exit code {self._process.returncode}")
        done = len(self.rounds())
        if not over and done not in self.used:
            self.used[done] = (time.monotonic(), self._seconds())
        return not over

    def rounds(self) -> list[dict]:
        path = self.directory / "metrics.jsonl"
        return [row for row in read_json_lines(path) if "time/total_s" in row] if path.exists() else []

    def between(self, first: int) -> tuple[int, float, dict[str, float]]:
        """Rounds after the ``first`` ones until the last that was seen to end: how many, their seconds, and by part."""
        last = max(self.used)
        (began, before), (ended, after) = self.used[first], self.used[last]
        return last - first, ended - began, {part: after[part] - before[part] for part in after}

    def stop(self) -> None:
        """Ends a run that has not ended itself."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _seconds(self) -> dict[str, float]:
        """vLLM and what starts it are below its fork server; the rest are workers of rewards."""
        below = {child.pid: child for child in self._process.children(recursive=True)}
        servers = [child for child in below.values() if "vllm_preload" in " ".join(child.cmdline())]
        engines = {child.pid for server in servers for child in [server, *server.children(recursive=True)]}
        groups = {
            "trainer": [self._process],
            "engines": [below[pid] for pid in engines & below.keys()],
            "rest": [below[pid] for pid in below.keys() - engines],
        }
        return {part: sum(sum(process.cpu_times()[:2]) for process in group) for part, group in groups.items()}


def run_mode(mode: str, options: argparse.Namespace, directory: str) -> dict[str, float]:
    """What a run of ``options.rounds`` rounds shows after the first ``options.skip``."""
    run = Run(options, directory, f"round.mode={mode}", "objective.importance=token", "monitor.progress=line")
    while run.watch():
        time.sleep(0.05)
    rounds = run.rounds()[options.skip :]
    seconds = sum(row["time/total_s"] for row in rounds)
    _, passed, used = run.between(options.skip)
    engines = next((int(each.split("=")[1]) for each in options.overrides if each.startswith("rollout.engines=")), 1)
    return {
        "trajectories per minute": 60 * options.trajectories * len(rounds) / seconds,
        "trainer waits": sum(row["time/rollouts_s"] for row in rounds) / seconds,
        "engines wait": 1 - used["engines"] / passed / engines,
    }


def compare_processor(options: argparse.Namespace) -> None:
    """A line for each checkout, of rounds while all run, with one thread for each trainer and engine."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        runs = []
        for checkout in options.checkouts:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            runs.append(Run(options, directory, "rollout.threads=1", checkout=checkout))
            stack.callback(runs[-1].stop)
        while all([run.watch() for run in runs]):
            time.sleep(0.05)
        together = max(run.used[options.skip][0] for run in runs if options.skip in run.used)
        for checkout, run in zip(options.checkouts, runs, strict=True):
            first = min(done for done, (clock, _) in run.used.items() if clock >= together)
            rounds, _, used = run.between(first)
            parts = ", ".join(f"{part} {seconds / rounds:.2f}" for part, seconds in used.items())
            print(f"{checkout}: {sum(used.values()) / rounds:.2f} s of processor a round ({parts}; {rounds} rounds)")


def compare_modes(options: argparse.Namespace) -> None:
    for mode in options.modes:
        with tempfile.TemporaryDirectory() as directory:
            found = run_mode(mode, options, directory)
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
    vllm_jobs.request_parameters = lambda sampling: request_parameters(sampling) | {"ignore_eos": True}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = make_tokenizer()
        make_model(TinyModelConfig(layers=2), tokenizer).save_pretrained(directory)
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
    processor = commands.add_parser("processor")
    modes.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    modes.add_argument("--trajectories", type=int, required=True, help="of a round")
    checkouts = "directories of this project, of older versions too, each DIR or DIR:MODULE that trains (default: %(default)s)"
    processor.add_argument("--checkouts", nargs="+", default=["."], help=checkouts)
    for command, rounds in ((modes, 10), (processor, 20)):
        command.add_argument("--config", type=Path, required=True)
        command.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
        command.add_argument("--skip", type=int, default=2, help="rounds at the beginning (default: %(default)s)")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    sharing = commands.add_parser("sharing")
    sharing.add_argument("--slower", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    sharing.add_argument("--prompts", type=int, default=48, help="of a round, of 8 responses each (default: %(default)s)")
    sharing.add_argument("--slots", type=int, default=32, help="requests at once in each engine (default: %(default)s)")
    sharing.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    {"modes": compare_modes, "processor": compare_processor, "sharing": compare_sharing}[options.command](options)


if __name__ == "__main__":
    main()
