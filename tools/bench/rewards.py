"""Throughput of the reward pool, and what it accepts: each answer for itself, and for the problems beside it, on data files."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from pmpo_megatron.rewards import RewardPool

SHIFTS = (1, 7)  # the answers of which other problems a solution is scored against, in places behind its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines with a field `answer`")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=5.0)
    options = parser.parse_args()
    columns = ("answers", "own accepted", "wrong pairs", "accepted", "per second", "time-outs")
    print(f"{'file':24}" + "".join(f"{column:>13}" for column in columns))
    with RewardPool("math", workers=options.workers, timeout=options.timeout) as pool:
        pool.score([r"\boxed{1}"] * options.workers, ["1"] * options.workers)  # workers have started
        for path in options.files:
            answers = [json.loads(line)["answer"] for line in path.open(encoding="utf-8")]
            own, pairs, accepted, speed, timeouts = measure(pool, answers)
            name = f"{path.parent.name}/{path.name}"
            print(f"{name:24}{len(answers):13}{own:13.2%}{pairs:13}{len(accepted):13}{speed:13.0f}{timeouts:13}")
            for solution, answer in accepted:
                print(f"    accepted: {solution}  for  {answer}")


def measure(pool: RewardPool, answers: list) -> tuple[float, int, list[tuple[str, str]], float, int]:
    """(accepted share of own answers, pairs that differ, those of them that were accepted, scores per second, time-outs)."""
    solutions = [rf"So the answer is $\boxed{{{a if isinstance(a, str) else ', '.join(a)}}}$." for a in answers]
    before, started = pool.stats.timeouts, time.monotonic()
    own = pool.score(solutions, answers)
    places = [(k, (k + shift) % len(answers)) for shift in SHIFTS for k in range(len(answers))]
    pairs = [(solutions[i], answers[k]) for k, i in places if answers[i] != answers[k]]
    scores = pool.score([solution for solution, _ in pairs], [answer for _, answer in pairs])
    speed = (len(own) + len(scores)) / (time.monotonic() - started)
    accepted = [pair for pair, score in zip(pairs, scores, strict=True) if score]
    return sum(own) / len(own), len(pairs), accepted, speed, pool.stats.timeouts - before


if __name__ == "__main__":
    main()
