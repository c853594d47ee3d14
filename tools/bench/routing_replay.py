"""What routing replay does where engine and trainer compute in different types: mismatch, clip fraction and p of short runs.

Each model, with a mixture of experts and made by tools/make_tiny_model.py, is trained with the quickstart's configuration, a
float32 trainer and a bfloat16 engine, for each value of ``round.routing_replay``. Means over the rounds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.monitor.jsonl import read_json_lines

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


def train(*arguments: str | Path) -> None:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, "-W", "ignore", "-m", "pmpo_megatron.commands.train", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def means(directory: Path) -> list[float]:
    """Of each of `COLUMNS` over the rounds; NaN where it was not measured."""
    rows = [*read_json_lines(directory / "metrics.jsonl")]
    values = [[row[name] for row in rows if name in row] for name in COLUMNS]
    return [sum(each) / len(each) if each else float("nan") for each in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="directories of Hugging Face checkpoints")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="in a round, each with 8 responses (default: %(default)s)")
    options = parser.parse_args()
    print(f"    {'experts':>8} {'replay':>8}" + "".join(f" {heading:>14}" for heading in COLUMNS.values()), flush=True)
    for model in options.models:
        experts = read_shape(model).experts
        for replay in ("off", "old", "rollout"):
            with tempfile.TemporaryDirectory() as work:
                settings = [f"model.path={model}", f"run.directory={work}/run", f"round.routing_replay={replay}"]
                settings += [f"run.rounds={options.rounds}", f"batch.prompts_per_round={options.prompts}"]
                settings += ["rollout.dtype=bfloat16", "evaluation.data=null", "monitor.report=false"]
                train("--config", ROOT / "examples/quickstart/config.yaml", *settings)
                values = "".join(f" {value:>14.4g}" for value in means(Path(work) / "run"))
            print(f"    {f'{experts.num_experts}:{experts.per_token}':>8} {replay:>8}{values}", flush=True)


if __name__ == "__main__":
    main()
