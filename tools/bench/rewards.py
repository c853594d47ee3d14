"""Throughput of the reward pool, and how many answers it accepts as their own boxed solution, on data files."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from pmpo_megatron.rewards import RewardPool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines with a field `answer`")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=5.0)
    options = parser.parse_args()
    print(f"{'file':24} {'answers':>8} {'own accepted':>13} {'other rejected':>15} {'per second':>11} {'time-outs':>10}")
    with RewardPool("math", workers=options.workers, timeout=options.timeout) as pool:
        pool.score([r"\boxed{1}"] * options.workers, ["1"] * options.workers)  # workers have started
        for path in options.files:
            answers = [json.loads(line)["answer"] for line in path.open(encoding="utf-8")]
            own, other, seconds, timeouts = measure(pool, answers)
            print(f"{path.name:24} {len(answers):8} {own:13.2%} {other:15.2%} {2 * len(answers) / seconds:11.0f} {timeouts:10}")


def measure(pool: RewardPool, answers: list) -> tuple[float, float, float, int]:
    """(accepted share of own answers, rejected share of different ones, seconds, time-outs)."""
    solutions = [rf"So the answer is $\boxed{{{a if isinstance(a, str) else ', '.join(a)}}}$." for a in answers]
    order = list(range(len(answers)))
    random.Random(0).shuffle(order)
    before, started = pool.stats.timeouts, time.monotonic()
    own = pool.score(solutions, answers)
    other = pool.score([solutions[i] for i in order], answers)
    seconds = time.monotonic() - started
    differs = [k for k, i in enumerate(order) if answers[i] != answers[k]]
    rejected = [other[k] == 0 for k in differs]
    return sum(own) / len(own), sum(rejected) / max(len(rejected), 1), seconds, pool.stats.timeouts - before


if __name__ == "__main__":
    main()
