#!/usr/bin/env python3
"""Runs a study (variants x seeds, equal budgets) in resumable pieces, and makes one report of all that is finished.

python tools/study.py examples/ablation/study.yaml --out runs/ablation
python tools/study.py examples/stability/study.yaml --out runs/stability --only ess lr-5 --seeds 1   # a piece
python tools/study.py examples/ablation/study.yaml --out runs/ablation --report-only

Killed anywhere, the same command goes on: finished runs are in OUT/results.csv and are not run again, one under way goes on
from its last checkpoint. Only that file is needed to go on elsewhere.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pmpo_megatron.config import apply_overrides, build, read_yaml
from pmpo_megatron.errors import ConfigError, PmpoError
from pmpo_megatron.monitor.comparison import write_comparison
from pmpo_megatron.monitor.read import read_run
from pmpo_megatron.monitor.study import Results, StudyConfig, pick, read_study
from pmpo_megatron.training.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
QUIET = ("monitor.tensorboard=false", "monitor.report=false", "monitor.progress=line", "monitor.token_examples=0")
STOPPED = threading.Event()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's file")
    parser.add_argument("--out", type=Path, required=True, help="directory of results.csv, report.html and the runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="LEVEL", help="only variants with these levels (a/b: both)")
    parser.add_argument("--seeds", type=int, help="seeds 1 to N (default: the study's)")
    parser.add_argument("--rounds", type=int, help="rounds of each run (default: the study's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    return parser.parse_args()


def main() -> int:
    options = parse()
    try:
        study = read_study(options.study, rounds=options.rounds, seeds=options.seeds)
        results = Results(options.out / "results.csv", study)
        complete = options.report_only or run_all(study, results, options)
        sentences = write_comparison(study, results.variants(), options.out / "report.html")
    except PmpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(sentences))
    print(f"report: {(options.out / 'report.html').resolve().as_uri()}")
    return 0 if complete else 1


def run_all(study: StudyConfig, results: Results, options: argparse.Namespace) -> bool:
    """Runs what is missing, seed after seed, so that a piece of a study is as even as can be; True if all is done."""
    variants = study.variants()
    configuration = read_yaml(ROOT / study.config)
    picked = pick(variants, options.only)
    for levels in picked:  # what is wrong in a setting is said before anything runs
        config = build(RunConfig, apply_overrides(configuration, [*study.settings, *variants[levels]]))
        known = config.evaluation.data.parts() if config.evaluation.data else {}
        if missing := [source for source in study.sources if source not in known]:
            raise ConfigError(
                "sources", f"{missing[0]}: not in evaluation.data.sources, which has {', '.join(known) or 'none'}"
            )
    keys = {levels: study.key(variants[levels], configuration) for levels in picked}
    wanted = []
    for seed in range(1, study.seeds + 1):
        for levels, key in keys.items():
            if not results.find(levels, seed, key):
                wanted.append((levels, seed, key, [*study.settings, *variants[levels]]))
    print(f"{len(wanted)} runs to do, {options.jobs} at a time", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: STOPPED.set())
    signal.signal(signal.SIGINT, lambda *_: STOPPED.set())
    writing = threading.Lock()

    def finish(run: tuple) -> bool:
        levels, seed, key, overrides = run
        directory, started = options.out / "runs" / "/".join(levels) / f"seed-{seed}", time.monotonic()
        code = run_one(study, directory, seed, overrides, threads=max(1, (os.cpu_count() or 1) // options.jobs))
        if code == 0 and not STOPPED.is_set():
            with writing:
                results.add(levels, seed, key, read_run(directory))
                shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        print(f"{'/'.join(levels)} seed {seed}: exit code {code}, {time.monotonic() - started:.0f} s", flush=True)
        return code == 0 and not STOPPED.is_set()

    with ThreadPoolExecutor(max_workers=options.jobs) as threads:
        return all([*threads.map(finish, wanted)])


def run_one(study: StudyConfig, directory: Path, seed: int, overrides: list[str], *, threads: int) -> int:
    """One run of the trainer, which goes on where it stopped; its output goes to ``log`` in ``directory``. Its exit code."""
    if STOPPED.is_set():
        return 1
    directory.mkdir(parents=True, exist_ok=True)
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "pmpo_megatron.commands.train"]  # ends with this process
    command += ["--config", study.config, *QUIET, *overrides]
    command += [
        f"run.directory={directory.resolve()}",
        f"run.rounds={study.rounds}",
        f"run.seed={seed}",
        f"sampling.seed={seed}",
        f"rollout.threads={threads}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        while (code := process.poll()) is None:
            if STOPPED.wait(0.5):
                process.send_signal(signal.SIGTERM)  # it saves and stops
                return process.wait()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
