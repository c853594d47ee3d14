#!/usr/bin/env python3
"""Prints responses that a run saved (rollouts.jsonl), readably.

python tools/show_rollouts.py runs/quickstart                       the last round's
python tools/show_rollouts.py runs/quickstart --round 3
python tools/show_rollouts.py runs/quickstart --worst --count 10    of the whole run; without --round

A run saves monitor.rollout_samples responses of every round.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from pmpo_megatron.errors import DataError, PmpoError
from pmpo_megatron.monitor.jsonl import read_json_lines

SHOWN = ("step", "prompt", "response", "reward", "answers")  # all else goes into the heading as it is


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory (run.directory of its config)")
    parser.add_argument("--round", type=int, metavar="N", help="of round N; default: the last, with --worst or --best all")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--worst", action="store_true", help="lowest rewards first")
    order.add_argument("--best", action="store_true", help="highest rewards first")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="at most so many (default: %(default)s)")
    return parser.parse_args()


def read_rollouts(run: Path) -> list[dict[str, Any]]:
    """Every saved response of ``run``, in the order of the rounds.

    Raises:
        DataError: there are none; says why.
    """
    path = run / "rollouts.jsonl"
    if not run.is_dir():
        raise DataError(f"{run} is not a directory; give the one that run.directory names")
    if not path.is_file():
        raise DataError(f"{run} is not a run: it has no rollouts.jsonl")
    found = list(read_json_lines(path))
    if not found:
        raise DataError(f"{path} is empty: no round is finished yet, or monitor.rollout_samples is 0")
    return found


def choose(rollouts: Sequence[dict[str, Any]], round_index: int | None, order: str | None) -> list[dict[str, Any]]:
    """Those of one round, or of all; ``order`` is worst, best or None (as saved).

    Raises:
        DataError: the round has none.
    """
    rounds = sorted({rollout["step"] for rollout in rollouts})
    if round_index is None and order is None:
        round_index = rounds[-1]
    chosen = [rollout for rollout in rollouts if round_index in (None, rollout["step"])]
    if not chosen:
        raise DataError(f"no responses of round {round_index} are saved; there are rounds {rounds[0]} to {rounds[-1]}")
    if order is not None:
        chosen.sort(key=lambda rollout: float(rollout["reward"]), reverse=order == "best")
    return chosen


def readable(value: Any) -> str:
    """``value`` as text in which nothing can command the terminal: a model may write escape sequences, too."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else escape(c) for c in str(value))


def escape(character: str) -> str:
    return character.encode("unicode_escape", errors="backslashreplace").decode()


def show(rollout: Mapping[str, Any], console: Console) -> None:
    """One response: a heading with its numbers, the prompt, the response, the accepted answers."""
    details = "".join(f", {readable(key)} {readable(value)}" for key, value in rollout.items() if key not in SHOWN)
    reward = float(rollout["reward"])
    console.print(Rule(style="green" if reward > 0 else "red"))
    console.print(Text(f"round {readable(rollout['step'])}, reward {reward:g}{details}"))
    console.print(Text(readable(rollout["prompt"]).strip(), style="bold"))
    console.print(Text(readable(rollout["response"]).strip()))
    console.print(Text(f"accepted: {' | '.join(map(readable, rollout.get('answers', [])))}", style="dim"))


def main() -> int:
    options = parse()
    order = "worst" if options.worst else "best" if options.best else None
    try:
        chosen = choose(read_rollouts(options.run), options.round, order)
    except PmpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    for rollout in chosen[: max(options.count, 0)]:
        show(rollout, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
