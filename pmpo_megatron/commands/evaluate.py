"""``pmpo-evaluate``: its options; `benchmarks.evaluation` does the rest. See docs/evaluation.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmpo_megatron.benchmarks.sources import BENCHMARKS, PAPER
from pmpo_megatron.training.launch import quiet_libraries, run_command, set_up_logging

# Imports that take seconds are in the functions that need them: `main` answers an interrupt from its first moment on.
EPILOG = f"""benchmarks: {", ".join(benchmark.name for benchmark in BENCHMARKS)}

examples:
  pmpo-evaluate /models/Qwen2.5-Math-7B --data-dir data/eval --out evaluations/greedy
  pmpo-evaluate pmpo=runs/math/checkpoints/round-00000100 --hf /models/Qwen2.5-Math-7B --out evaluations/greedy
  pmpo-evaluate /models/Qwen2.5-Math-7B --benchmarks AIME24 --samples 32 --temperature 0.6 --top-p 0.95 --out evaluations/avg32

The same command goes on with an evaluation that was interrupted. Models evaluated into the same --out share its table.
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pmpo-evaluate",
        description="Evaluates models on benchmarks with vLLM: pass@1, avg@k and pass@k with standard errors.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="Hugging Face directory, converted Megatron checkpoint, or a run's round-...; NAME=PATH names its row",
    )
    add("--out", type=Path, required=True, help="directory of records and tables")
    add("--hf", type=Path, help="configuration and tokenizer of a Megatron checkpoint that has none beside it")
    add("--force", action="store_true", help="remove the models' earlier records in --out, and start anew")
    _add_problem_options(parser.add_argument_group("problems"))
    _add_sampling_options(parser.add_argument_group("responses"))
    _add_engine_options(parser.add_argument_group("engine"))
    return parser.parse_args(arguments)


def _add_problem_options(group: Any) -> None:
    from pmpo_megatron.data.prompts import TEMPLATES

    add = group.add_argument
    add(
        "--benchmarks",
        nargs="+",
        default=list(PAPER),
        metavar="NAME",
        help=f"names, or .jsonl and .parquet files of your own (default: {' '.join(PAPER)})",
    )
    add(
        "--data-dir",
        type=Path,
        help=f"directory with {BENCHMARKS[0].stem}.jsonl and so on; "
        "benchmarks without a file there are fetched from Hugging Face",
    )
    add("--problem-field", default="problem", help="field of the files (default: %(default)s)")
    add(
        "--answer-field",
        type=lambda text: None if text == "null" else text,
        default="answer",
        help="field of the files: an answer, or a list of accepted ones; null: rows have tests (default: %(default)s)",
    )
    add("--max-problems", type=int, metavar="N", help="only the first N of every benchmark")
    add(
        "--template",
        default="qwen-math",
        help=f"{', '.join(TEMPLATES)}, chat (the tokenizer's own), or a text that contains {{problem}} (default: %(default)s)",
    )
    add("--system-prompt", help="template chat: the system message")


def _add_sampling_options(group: Any) -> None:
    add = group.add_argument
    add("--samples", type=int, default=1, metavar="N", help="responses to each problem (default: %(default)s)")
    add("--temperature", type=float, help="0 is greedy (default: 0 with one response, else 0.6)")
    add("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    add("--max-tokens", type=int, default=3000, help="tokens of a response at most (default: %(default)s)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a response, beside the model's end token")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--pass-k", type=int, nargs="+", metavar="K", help="show pass@K (default: powers of two up to --samples)")
    add(
        "--rewards",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="fields of the rewards section of a run's configuration, e.g. timeout_s=60 code.wall_s=20",
    )
    add(
        "--reward",
        default="math",
        help="of benchmarks without one of their own: math, exact, choice, code, or package.module:function "
        "(response, answers[, metadata]) -> float; at least 0.5 is correct (default: %(default)s)",
    )


def _add_engine_options(group: Any) -> None:
    add = group.add_argument
    add(
        "--rollout",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="fields of the rollout section of a run's configuration: "
        "engines=2 tensor_parallel=4 dtype=bfloat16 max_model_len=4096 kv_cache_gib=2 threads=8 ...",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU where there is one)")
    add(
        "--chunk",
        type=int,
        metavar="N",
        help="problems generated together and then recorded: what an interruption loses "
        "at most (default: as many as fill the engines twice)",
    )
    add("--workers", type=int, default=4, help="processes that score (default: %(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``pmpo-evaluate``; returns the exit code: 0 done, 2 bad input, 1 failed, 130 interrupted."""
    return run_command(lambda: command(parse(arguments)))


def command(options: argparse.Namespace) -> int:
    set_up_logging(0)
    quiet_libraries()
    from pmpo_megatron.benchmarks.evaluation import evaluate

    evaluate(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
