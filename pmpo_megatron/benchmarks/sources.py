"""Which benchmarks there are, and where their problems come from: a file, or a public Hugging Face data set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pmpo_megatron.benchmarks.formats import human_eval, live_code_bench, mbpp, multiple_choice
from pmpo_megatron.checkpoint.files import replace_text
from pmpo_megatron.errors import ConfigError, DataError

FILES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Benchmark:
    """A set of problems with accepted answers.

    ``file`` is used where it exists, else ``dataset``. ``answer_after`` is a mark in the data set's answer field: the
    answer is what follows its last occurrence. ``read`` makes a row of our own of a published one, in a file or a data set;
    ``reward`` scores it, None for that of the command.
    """

    name: str
    stem: str  # of its file, in the directory of benchmarks and in the results
    dataset: str | None = None
    subset: str | None = None
    split: str = "test"
    problem_field: str = "problem"
    answer_field: str = "answer"
    answer_after: str | None = None
    file: Path | None = None
    read: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    reward: str | None = None


# The first five are the benchmarks of the PMPO paper, in its order; lkevinzc/math-eval has them with its numbers of problems.
BENCHMARKS = (
    Benchmark("AIME24", "aime24", "lkevinzc/math-eval", split="aime"),
    Benchmark("AMC", "amc23", "lkevinzc/math-eval", split="amc"),
    Benchmark("MATH500", "math500", "lkevinzc/math-eval", split="math"),
    Benchmark("Minerva", "minerva", "lkevinzc/math-eval", split="minerva"),
    Benchmark("OlympiadBench", "olympiadbench", "lkevinzc/math-eval", split="olympiad_bench"),
    Benchmark("GSM8K", "gsm8k", "openai/gsm8k", subset="main", problem_field="question", answer_after="####"),
    Benchmark("HumanEval+", "humanevalplus", "evalplus/humanevalplus", read=human_eval, reward="code"),
    Benchmark("MBPP+", "mbppplus", "evalplus/mbppplus", read=mbpp, reward="code"),
    Benchmark("LiveCodeBench", "livecodebench", read=live_code_bench, reward="code"),
    Benchmark("ARC", "arc", "allenai/ai2_arc", subset="ARC-Challenge", read=multiple_choice, reward="choice"),
    Benchmark(
        "CommonsenseQA", "commonsenseqa", "tau/commonsense_qa", split="validation", read=multiple_choice, reward="choice"
    ),
    Benchmark("HellaSwag", "hellaswag", "Rowan/hellaswag", split="validation", read=multiple_choice, reward="choice"),
    Benchmark("MMLU-Pro", "mmlupro", "TIGER-Lab/MMLU-Pro", read=multiple_choice, reward="choice"),
)
PAPER = tuple(benchmark.name for benchmark in BENCHMARKS[:5])


def find_benchmarks(names: Sequence[str], data_dir: Path | None) -> list[Benchmark]:
    """The benchmarks called ``names``, each a name of the table or a file.

    Raises:
        ConfigError: a name that is neither, with the nearest one; or two benchmarks of the same name.
    """
    benchmarks = [_find(name, data_dir) for name in names]
    for attribute in ("name", "stem"):
        values = [getattr(benchmark, attribute).lower() for benchmark in benchmarks]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ConfigError("--benchmarks", f"{twice!r} is there twice; results are kept by this name")
    return benchmarks


def _find(name: str, data_dir: Path | None) -> Benchmark:
    if name.endswith(FILES) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise ConfigError("--benchmarks", f"{name}: no such file")
        if not name.endswith(FILES):
            raise ConfigError("--benchmarks", f"{name}: is none of {', '.join(FILES)}")
        return Benchmark(path.stem, path.stem, file=path)
    known = {_plain(key): benchmark for benchmark in BENCHMARKS for key in (benchmark.name, benchmark.stem)}
    benchmark = known.get(_plain(name))
    if benchmark is None:
        near = get_close_matches(_plain(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {known[near[0]].name}?" if near else f"there are {', '.join(b.name for b in BENCHMARKS)}"
        raise ConfigError("--benchmarks", f"{name!r} is neither a benchmark nor a {FILES[0]} file; {hint}")
    files = [data_dir / f"{benchmark.stem}{suffix}" for suffix in FILES] if data_dir is not None else []
    for file in files:
        if file.is_file():
            return Benchmark(benchmark.name, benchmark.stem, file=file, read=benchmark.read, reward=benchmark.reward)
    if benchmark.dataset is None:
        named = f"{benchmark.name} is no data set that could be fetched: put its file, as {benchmark.stem}.jsonl"
        raise ConfigError("--data-dir", f"{named}, into a directory and name it")
    return benchmark


def problem_file(benchmark: Benchmark, cache: Path) -> Path:
    """The benchmark's file; where it has none, its data set is fetched once and written into ``cache``, as are its rows
    of another format.

    Raises:
        DataError: the data set cannot be fetched, or a row lacks a field.
    """
    if benchmark.file is not None and benchmark.read is None:
        return benchmark.file
    path = cache / f"{benchmark.stem}.jsonl"
    if benchmark.file is not None or not path.is_file():
        rows = _fetch(benchmark) if benchmark.file is None else _read_file(benchmark, benchmark.file)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(lines))
    return path


def _fetch(benchmark: Benchmark) -> list[dict[str, Any]]:
    import datasets

    assert benchmark.dataset is not None  # of those without a file
    where = benchmark.dataset + (f"/{benchmark.subset}" if benchmark.subset else "") + f"[{benchmark.split}]"
    try:
        rows = list(datasets.load_dataset(benchmark.dataset, benchmark.subset, split=benchmark.split))
    except Exception as error:  # the library raises its own, urllib's and OS errors; all mean the same here
        raise DataError(
            f"{benchmark.name}: the Hugging Face data set {where} cannot be fetched ({error}); "
            f"or put {benchmark.stem}.jsonl into a directory and name it with --data-dir"
        ) from None
    return [_cleaned(benchmark, row, f"{where}: row {number}") for number, row in enumerate(rows, 1)]


def _read_file(benchmark: Benchmark, file: Path) -> list[dict[str, Any]]:
    from pmpo_megatron.data.prompts import DataConfig, read_rows  # takes seconds: the command's options are read before

    return [_cleaned(benchmark, row, where) for where, row in read_rows(DataConfig(source=str(file)))]


def _cleaned(benchmark: Benchmark, row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row as our own files have it: fields ``problem`` and ``answer``, or what its reward needs."""
    if benchmark.read is not None:
        try:
            return benchmark.read(row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{where}: no row of {benchmark.name}: {error!r}; it has {', '.join(row)}") from None
    for name in (benchmark.problem_field, benchmark.answer_field):
        if row.get(name) is None:
            raise DataError(f"{where}: no field {name!r}; it has {', '.join(row)}")
    answer = row[benchmark.answer_field]
    if benchmark.answer_after is not None:
        answer = answer.rpartition(benchmark.answer_after)[2].strip()
    return {"problem": row[benchmark.problem_field], "answer": answer}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
