"""Makes a tiny model, Qwen2 or with experts, that half knows generated tasks: where the quickstarts and the studies start."""

from __future__ import annotations

import argparse
from pathlib import Path

from pmpo_megatron.data.generated import TASKS
from pmpo_megatron.hf.tiny_model import TinyModelConfig, make_tiny_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the Hugging Face checkpoint")
    parser.add_argument("--steps", type=int, default=TinyModelConfig.steps, help="supervised steps (default: %(default)s)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=task_and_levels,
        default=[*TinyModelConfig().tasks.items()],
        metavar="TASK=LEVELS",
        help=f"which of {', '.join(TASKS)} it learns, a task in each step, and which of their levels (default: arithmetic=4,5)",
    )
    parser.add_argument(
        "--slip-rate",
        type=float,
        default=TinyModelConfig.slip_rate,
        help="how often the worst remembered fact is wrong in the solutions it learns from (default: %(default)s)",
    )
    parser.add_argument(
        "--slip-skew",
        type=float,
        default=TinyModelConfig.slip_skew,
        help="the smaller, the more facts are doubtful: rates are the worst one's times u^SKEW, u uniform; 0: each task's own "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--call-rate",
        type=float,
        default=TinyModelConfig.call_rate,
        help="how often a step of those solutions is left to a calculator, by a question mark (default: %(default)s)",
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=TinyModelConfig.vocabulary,
        help="tokens learned from the tasks' texts, 300 at least; 0: one for each character, for arithmetic alone "
        "(default: %(default)s)",
    )
    parser.add_argument("--layers", type=int, default=TinyModelConfig.layers, help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=TinyModelConfig.hidden_size, help="(default: %(default)s)")
    parser.add_argument(
        "--experts", type=int, default=TinyModelConfig.experts, help="a Qwen3-MoE with so many (default: %(default)s: a Qwen2)"
    )
    parser.add_argument(
        "--experts-per-token", type=int, default=TinyModelConfig.experts_per_token, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--positions", type=int, default=TinyModelConfig.positions, help="longest sequence (default: %(default)s)"
    )
    parser.add_argument("--endless", action="store_true", help="no end token: responses go on to the limit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    values = vars(options) | {"tasks": dict(options.tasks)}
    make_tiny_model(values.pop("out"), TinyModelConfig(**values))


def task_and_levels(text: str) -> tuple[str, tuple[int, ...]]:
    """``programs=2,3`` as a name and its levels."""
    name, _, levels = text.partition("=")
    chosen = tuple(int(level) for level in levels.split(",") if level.isdecimal())
    if name not in TASKS or not chosen or not set(chosen) <= set(TASKS[name].levels):
        known = ", ".join(f"{task} ({','.join(map(str, entry.levels))})" for task, entry in TASKS.items())
        raise argparse.ArgumentTypeError(f"{text!r} must be TASK=LEVELS, of {known}")
    return name, chosen


if __name__ == "__main__":
    main()
