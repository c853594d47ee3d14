"""What routing replay does where engine and trainer compute in different types: mismatch, clip fraction and p of short runs.

Tiny models with a mixture of experts are warm-started on the quickstart's task; each is then trained with its configuration,
a float32 trainer and a bfloat16 engine, for each value of ``round.routing_replay``. Means over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "mismatch/mean_abs": "mean gap",
    "mismatch/max_abs": "largest gap",
    "routing/other_than_engine": "others chosen",
    "objective/clip_fraction": "clip fraction",
    "objective/p_mean": "p",
    "objective/ess_fraction": "ESS",
    "reward/mean": "reward",
}


def run(*command: str | Path) -> None:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), TOKENIZERS_PARALLELISM="false")
    subprocess.run([sys.executable, "-W", "ignore", *map(str, command)], cwd=ROOT, env=environment, check=True)


def means(directory: Path) -> list[float]:
    """Of each of `COLUMNS` over the rounds; NaN where it was not measured."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    values = [[row[name] for row in rows if name in row] for name in COLUMNS]
    return [sum(each) / len(each) if each else float("nan") for each in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", nargs="+", default=["8:2", "64:8"], help="experts and experts per token of each model")
    parser.add_argument("--steps", type=int, default=200, help="of the warm start (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="in a round, each with 8 responses (default: %(default)s)")
    options = parser.parse_args()
    lines = [f"    {'experts':>8} {'replay':>8}" + "".join(f" {heading:>14}" for heading in COLUMNS.values())]
    with tempfile.TemporaryDirectory() as work:
        for experts in options.experts:
            count, _, per_token = experts.partition(":")
            model = Path(work) / f"model-{count}"
            sizes = ["--experts", count, "--experts-per-token", per_token, "--steps", str(options.steps)]
            run(ROOT / "tools/make_tiny_model.py", "--out", model, *sizes)
            for replay in ("off", "old", "rollout"):
                directory = Path(work) / f"{count}-{replay}"
                settings = [f"model.path={model}", f"run.directory={directory}", f"round.routing_replay={replay}"]
                settings += [f"run.rounds={options.rounds}", f"batch.prompts_per_round={options.prompts}"]
                settings += ["rollout.dtype=bfloat16", "evaluation.data=null", "monitor.report=false"]
                config = ["--config", ROOT / "examples/quickstart/config.yaml"]
                run("-m", "pmpo_megatron.commands.train", *config, *settings)
                lines.append(f"    {experts:>8} {replay:>8}" + "".join(f" {value:>14.4g}" for value in means(directory)))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
