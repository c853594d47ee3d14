"""``pmpo-evaluate``: models answer benchmarks with the rollout engine and are scored as in training. See docs/evaluation.md."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pmpo_megatron.benchmarks.models import Model, find_models, hugging_face_directory, load_tokenizer, weights_digest
from pmpo_megatron.benchmarks.records import BenchmarkRecords, ModelDirectory
from pmpo_megatron.benchmarks.run import Task, run_tasks
from pmpo_megatron.benchmarks.sources import BENCHMARKS, PAPER, Benchmark, find_benchmarks, problem_file
from pmpo_megatron.benchmarks.statistics import default_ks
from pmpo_megatron.benchmarks.summary import describe_benchmark, write_model_summary, write_summary
from pmpo_megatron.config import apply_overrides, build, to_plain
from pmpo_megatron.data.prompts import TEMPLATES, DataConfig, load_prompts
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards import RewardConfig, RewardScorer
from pmpo_megatron.rewards.functions import check_functions
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.factory import make_engine
from pmpo_megatron.training.launch import close_on_interrupt, quiet_libraries, run_command, set_up_logging

logger = logging.getLogger("pmpo_megatron.commands.evaluate")  # also where this file is run as __main__
ANY_LENGTH = 1 << 40  # prompts that are too long are counted by run_tasks, not left out
EPILOG = f"""benchmarks: {", ".join(benchmark.name for benchmark in BENCHMARKS)}

examples:
  pmpo-evaluate /models/Qwen2.5-Math-7B --data-dir data/eval --out evaluations/greedy
  pmpo-evaluate pmpo=runs/math/checkpoints/round-00000100 --hf /models/Qwen2.5-Math-7B --out evaluations/greedy
  pmpo-evaluate /models/Qwen2.5-Math-7B --benchmarks AIME24 --samples 32 --temperature 0.6 --top-p 0.95 --out evaluations/avg32

The same command goes on with an evaluation that was interrupted. Models evaluated into the same --out share its table.
"""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is the same for every model."""

    out: Path
    benchmarks: tuple[Benchmark, ...]
    data: DataConfig  # template and fields; the source is each benchmark's own
    sampling: SamplingConfig
    rewards: RewardConfig
    rollout: RolloutConfig
    ks: tuple[int, ...]
    chunk: int
    device: str
    force: bool


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pmpo-evaluate",
        description="Evaluates models on benchmarks with vLLM: pass@1, avg@k and pass@k with standard errors.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="Hugging Face directory, converted Megatron checkpoint, or a run's "
        "round-...; NAME=PATH names its row")  # fmt: skip
    add("--out", type=Path, required=True, help="directory of records and tables")
    add("--hf", type=Path, help="configuration and tokenizer of a Megatron checkpoint that has none beside it")
    add("--force", action="store_true", help="remove the models' earlier records in --out, and start anew")
    _add_problem_options(parser.add_argument_group("problems"))
    _add_sampling_options(parser.add_argument_group("responses"))
    _add_engine_options(parser.add_argument_group("engine"))
    return parser.parse_args(arguments)


def _add_problem_options(group: Any) -> None:
    add = group.add_argument
    add("--benchmarks", nargs="+", default=list(PAPER), metavar="NAME",
        help=f"names, or .jsonl and .parquet files of your own (default: {' '.join(PAPER)})")  # fmt: skip
    add("--data-dir", type=Path, help=f"directory with {BENCHMARKS[0].stem}.jsonl and so on; "
        "benchmarks without a file there are fetched from Hugging Face")  # fmt: skip
    add("--problem-field", default="problem", help="field of the files (default: %(default)s)")
    add(
        "--answer-field",
        default="answer",
        help="field of the files: an answer, or a list of accepted ones (default: %(default)s)",
    )
    add("--max-problems", type=int, metavar="N", help="only the first N of every benchmark")
    add("--template", default="qwen-math", help=f"{', '.join(TEMPLATES)}, chat (the tokenizer's own), or a text that contains "
        "{problem} (default: %(default)s)")  # fmt: skip
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
    add("--reward", default="math", help="math, exact, or package.module:function (response, answers) -> [0, 1]; "
        "at least 0.5 is correct (default: %(default)s)")  # fmt: skip


def _add_engine_options(group: Any) -> None:
    add = group.add_argument
    add(
        "--urls",
        nargs="+",
        default=[],
        metavar="URL",
        help="running vLLM servers that hold the model, instead of an engine here",
    )
    add("--rollout", nargs="+", default=[], metavar="KEY=VALUE", help="fields of the rollout section of a run's configuration: "
        "engines=2 tensor_parallel=4 dtype=bfloat16 max_model_len=4096 kv_cache_gib=2 threads=8 ...")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU where there is one)")
    add("--chunk", type=int, metavar="N", help="problems generated together and then recorded: what an interruption loses "
        "at most (default: as many as fill the engines twice)")  # fmt: skip
    add("--workers", type=int, default=4, help="processes that score (default: %(default)s)")


def make_plan(options: argparse.Namespace) -> EvaluationPlan:
    """Everything that the options say, checked.

    Raises:
        ConfigError: an option is wrong; names it.
    """
    temperature = options.temperature if options.temperature is not None else 0.6 if options.samples > 1 else 0.0
    if options.samples > 1 and temperature == 0:
        raise ConfigError("--samples", f"{options.samples} with temperature 0 gives the same response every time")
    sampling = SamplingConfig(
        samples_per_prompt=options.samples, temperature=temperature, top_p=options.top_p, max_tokens=options.max_tokens,
        stop=tuple(options.stop), seed=options.seed,
    )  # fmt: skip
    data = DataConfig(
        source="-", problem_field=options.problem_field, answer_field=options.answer_field, template=options.template,
        system_prompt=options.system_prompt, max_problems=options.max_problems, max_prompt_tokens=ANY_LENGTH,
    )  # fmt: skip
    rollout = _rollout_config(options)
    rewards = RewardConfig(functions={options.reward: 1.0}, workers=options.workers)
    check_functions(rewards.functions, rewards.code)
    ks = tuple(sorted(options.pass_k)) if options.pass_k else default_ks(options.samples)
    if ks and not 1 <= ks[0] <= ks[-1] <= options.samples:
        raise ConfigError("--pass-k", f"{list(ks)}: must lie between 1 and --samples, which is {options.samples}")
    at_once = rollout.max_num_seqs * (len(rollout.urls) or rollout.engines)
    chunk = options.chunk if options.chunk is not None else max(1, 2 * at_once // options.samples)
    if chunk < 1:
        raise ConfigError("--chunk", f"{chunk} must be at least 1")
    return EvaluationPlan(
        out=options.out, benchmarks=tuple(find_benchmarks(options.benchmarks, options.data_dir)), data=data, sampling=sampling,
        rewards=rewards, rollout=rollout, ks=ks, chunk=chunk,
        device=_device(options.device), force=options.force,
    )  # fmt: skip


def _rollout_config(options: argparse.Namespace) -> RolloutConfig:
    values = {"gpu_memory_utilization": 0.9}  # training leaves room for the trainer; here the GPU is the engine's alone
    if options.urls:
        if len(options.models) > 1:
            raise ConfigError("--urls", f"the servers hold one model, but {len(options.models)} are named")
        values |= {"engine": "server", "urls": options.urls}
    try:
        config = build(RolloutConfig, apply_overrides(values, options.rollout))
    except ConfigError as error:
        raise error.within("--rollout") from None
    if config.nodes == "all":
        raise ConfigError("--rollout.nodes", "an evaluation runs on one node; for more, start servers and name their --urls")
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError("--rollout.engine", "vllm is not installed; see the README for the requirements")
    return config


def _device(choice: str) -> str:
    if choice != "auto":
        return choice
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def settings_of(model: Model, plan: EvaluationPlan) -> dict[str, Any]:
    """What the responses and their scores depend on, plain values: an evaluation goes on only with the same."""
    settings = {"weights": weights_digest(model.path), "template": plan.data.template, "system_prompt": plan.data.system_prompt}
    settings |= to_plain(plan.sampling) | {"reward": next(iter(plan.rewards.functions))}
    return settings | {"dtype": plan.rollout.dtype, "max_model_len": plan.rollout.max_model_len}


def evaluate_model(model: Model, plan: EvaluationPlan) -> None:
    """Answers what is missing of ``model``'s records, and writes its figures."""
    settings = settings_of(model, plan)
    with ExitStack() as parts:
        directory = ModelDirectory(plan.out / model.name, settings, force=plan.force)
        parts.callback(directory.close)
        tasks = _make_tasks(model, plan, directory.path, parts)
        missing = sum(len(task.records.missing) for task in tasks)
        total = sum(len(task.prompts) for task in tasks)
        logger.info("%s: %d of %d problems are to be answered", model.name, missing, total)
        if missing:
            _answer(model, plan, tasks, directory.path)
        figures = {task.benchmark.name: describe_benchmark(task.records.records, plan.ks) for task in tasks}
        write_model_summary(directory.path, model, settings, figures)


def _make_tasks(model: Model, plan: EvaluationPlan, directory: Path, parts: ExitStack) -> list[Task]:
    tokenizer = load_tokenizer(model, plan.data.template)
    tasks = []
    for benchmark in plan.benchmarks:
        data = replace(plan.data, source=str(problem_file(benchmark, plan.out / "problems")))
        if benchmark.file is None:
            data = replace(data, problem_field="problem", answer_field="answer")
        prompts = load_prompts(data, tokenizer).prompts
        records = BenchmarkRecords(directory / f"{benchmark.stem}.jsonl", prompts, samples=plan.sampling.samples_per_prompt)
        parts.callback(records.close)
        tasks.append(Task(benchmark, prompts, records))
    return tasks


def _answer(model: Model, plan: EvaluationPlan, tasks: Sequence[Task], directory: Path) -> None:
    with ExitStack() as parts:
        path = parts.enter_context(hugging_face_directory(model, directory))
        limit = plan.rollout.max_model_len or model.max_length
        longest = max(len(prompt.token_ids) for task in tasks for prompt in task.prompts)
        needed = min(limit or ANY_LENGTH, longest + plan.sampling.max_tokens)  # a KV cache for more may not fit
        rollout = replace(plan.rollout, max_model_len=needed)
        engine = make_engine(rollout, model_path=str(path), device=plan.device, worker_extension=None)
        parts.callback(engine.close)
        scorer = RewardScorer(plan.rewards, max_tokens=plan.sampling.max_tokens)
        parts.callback(scorer.close)
        run_tasks(tasks, engine, scorer, sampling=plan.sampling, max_length=limit, chunk=plan.chunk)
        stats = scorer.pool.stats
        failed = stats.timeouts + stats.crashes
        if failed or stats.errors:
            logger.warning("scored 0 because scoring took too long or crashed: %d; because of errors: %s", failed, stats.errors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``pmpo-evaluate``; returns the exit code: 0 done, 2 bad input, 1 failed, 130 interrupted."""
    return run_command(lambda: command(parse(arguments)))


def command(options: argparse.Namespace) -> int:
    set_up_logging(0)
    quiet_libraries()
    models = find_models(options.models, options.hf)
    plan = make_plan(options)
    if plan.rollout.engine == "server" and not models[0].is_hugging_face:
        raise ConfigError("--urls", f"the servers cannot be given {models[0].path}; name the directory they were started with")
    close_on_interrupt()
    for model in models:
        evaluate_model(model, plan)
    print(write_summary(plan.out), end="")
    logger.info("records and summary.json: %s", plan.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
