"""Figures of recorded responses, and the table of all models in a directory of results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmpo_megatron.benchmarks.models import Model
from pmpo_megatron.benchmarks.records import SUMMARY, TOO_LONG, Record
from pmpo_megatron.benchmarks.sources import BENCHMARKS
from pmpo_megatron.benchmarks.statistics import Estimate, accuracy, average, pass_at_k
from pmpo_megatron.checkpoint.files import replace_text
from pmpo_megatron.errors import DataError

TABLE = "summary.md"
NONE = "-"
Pair = Sequence[float | None]  # (value, standard error) as the file of a summary has it
Pick = Callable[[dict[str, Any]], Pair | None]  # one of the figures of a benchmark


def describe_benchmark(records: Sequence[Record], ks: Sequence[int]) -> dict[str, Any]:
    """Figures of one benchmark, plain values: ``accuracy`` and ``pass@k`` as [value, standard error], fractions of 1."""
    scores = [record.scores for record in records]
    responses = [response for record in records for response in record.responses]
    reasons = [response.finish_reason for response in responses]
    return {
        "problems": len(records),
        "accuracy": _pair(accuracy(scores)),
        "pass_at_k": {str(k): _pair(pass_at_k(scores, k)) for k in ks},
        "mean_tokens": sum(response.tokens for response in responses) / len(responses),
        "truncated_fraction": reasons.count("length") / len(reasons),
        "prompts_too_long": sum(record.responses[0].finish_reason == TOO_LONG for record in records),
    }


def write_model_summary(
    directory: Path, model: Model, settings: Mapping[str, Any], benchmarks: Mapping[str, dict[str, Any]]
) -> None:
    """Adds ``benchmarks`` (name -> figures) to those that were evaluated earlier with the same settings."""
    path = directory / SUMMARY
    earlier = _read(path)["benchmarks"] if path.is_file() else {}
    summary = {
        "model": model.name,
        "path": str(model.path.resolve()),
        "settings": dict(settings),
        "benchmarks": earlier | dict(benchmarks),
    }
    replace_text(path, json.dumps(summary, indent=1) + "\n")


def write_summary(out: Path) -> str:
    """Writes ``summary.json`` and ``summary.md`` over all models in ``out``; the text of the latter."""
    models = [_read(path) for path in sorted(out.glob(f"*/{SUMMARY}"), key=lambda path: path.parent.name)]
    names = _columns(models)
    for model in models:
        model["average"] = _pair(_row_average(model, names, lambda figures: figures["accuracy"]))
    replace_text(out / SUMMARY, json.dumps({"benchmarks": names, "models": models}, indent=1) + "\n")
    text = make_tables(models, names)
    replace_text(out / TABLE, text)
    return text


def make_tables(models: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Markdown: accuracy with a row per model, pass@k where there are several responses, and how each was sampled."""
    rows = [[model["model"], *_cells(model, names, lambda figures: figures["accuracy"])] for model in models]
    parts = ["Accuracy in percent ± standard error", "", *_table(["model", *names, "average"], rows)]
    rows = [[model["model"], f"pass@{k}", *_cells(model, names, _pass_at(k))] for model in models for k in _ks(model)]
    if rows:
        parts += ["", *_table(["model", "", *names, "average"], rows)]
    return "\n".join([*parts, "", *(_caption(model) for model in models)]) + "\n"


def _caption(model: dict[str, Any]) -> str:
    settings, benchmarks = model["settings"], model["benchmarks"].values()
    samples, temperature = settings["samples_per_prompt"], settings["temperature"]
    how = "pass@1, greedy" if not temperature else f"avg@{samples}, temperature {temperature:g}, top_p {settings['top_p']:g}"
    problems = sum(figures["problems"] for figures in benchmarks)
    truncated = sum(figures["truncated_fraction"] * figures["problems"] for figures in benchmarks) / problems
    tokens = sum(figures["mean_tokens"] * figures["problems"] for figures in benchmarks) / problems
    too_long = sum(figures["prompts_too_long"] for figures in benchmarks)
    text = f"- {model['model']}: {how}, template {settings['template']!r}, at most {settings['max_tokens']} tokens; "
    text += f"{problems} problems, {tokens:.0f} tokens per response, {100 * truncated:.1f} % cut at the limit"
    return text + (f", {too_long} prompts too long and counted as failed" if too_long else "")


def _columns(models: Sequence[dict[str, Any]]) -> list[str]:
    """Every benchmark that a model has: those of the table in its order, then files by name."""
    names = {name for model in models for name in model["benchmarks"]}
    known = [benchmark.name for benchmark in BENCHMARKS if benchmark.name in names]
    return known + sorted(names - set(known))


def _ks(model: dict[str, Any]) -> list[str]:
    return sorted({k for figures in model["benchmarks"].values() for k in figures["pass_at_k"]}, key=int)


def _pass_at(k: str) -> Pick:
    return lambda figures: figures["pass_at_k"].get(k)


def _cells(model: dict[str, Any], names: Sequence[str], pick: Pick) -> list[str]:
    pairs = [pick(model["benchmarks"][name]) if name in model["benchmarks"] else None for name in names]
    mean = _row_average(model, names, pick)
    return [NONE if pair is None else _estimate(pair).percent() for pair in pairs] + [NONE if mean is None else mean.percent()]


def _row_average(model: dict[str, Any], names: Sequence[str], pick: Pick) -> Estimate | None:
    """None if a benchmark is missing: the average of others is not comparable."""
    pairs = [pick(model["benchmarks"][name]) if name in model["benchmarks"] else None for name in names]
    estimates = [_estimate(pair) for pair in pairs if pair is not None]
    return average(estimates) if len(estimates) == len(pairs) else None


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]


def _pair(estimate: Estimate | None) -> Pair | None:
    if estimate is None:
        return None
    return [estimate.value, None if math.isnan(estimate.error) else estimate.error]


def _estimate(pair: Pair) -> Estimate:
    value, error = (math.nan if number is None else number for number in pair)
    return Estimate(value, error)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}; remove it, and evaluate again to have it written anew") from None
