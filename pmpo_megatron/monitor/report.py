"""One self-contained HTML page about one run or several: plots, configuration, sample rollouts. Works offline."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from pmpo_megatron.checkpoint.files import replace_text
from pmpo_megatron.monitor.page import page
from pmpo_megatron.monitor.plots import PLOTS, held_out, sources
from pmpo_megatron.monitor.progress import format_count, format_seconds
from pmpo_megatron.monitor.read import RunRecord, read_runs
from pmpo_megatron.monitor.style import NUM_SERIES
from pmpo_megatron.monitor.token_page import write_token_page

MAX_ROLLOUTS = 12  # shown of each run, the last ones


def write_report(runs: Sequence[str | Path], out: str | Path, *, title: str | None = None) -> Path:
    """Writes the page about ``runs`` (their directories) to ``out``, replacing it in one step.

    Raises:
        DataError: a directory is no run, or its record is damaged.
    """
    records = read_runs([Path(run) for run in runs])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pages = {run.label: page for run in records if (page := write_token_page(run, run.directory / "tokens.html"))}
    links = {label: os.path.relpath(page, out.parent) for label, page in pages.items()}
    replace_text(out, render(records, title=title, token_pages=links))
    return out


def render(runs: Sequence[RunRecord], *, title: str | None = None, token_pages: Mapping[str, str] | None = None) -> str:
    """The page as text, with links to the ``token_pages`` of runs (by label, relative to the page)."""
    sections = [
        f'<h2>Summary</h2><div class="card">{summary_table(runs)}</div>',
        source_section(runs),
        _links(token_pages or {}),
    ]
    for heading, plots in PLOTS.items():
        if pictures := [svg for plot in plots if (svg := plot(runs)) is not None]:
            cards = "".join(f'<div class="card">{svg}</div>' for svg in pictures)
            sections.append(f'<h2>{heading}</h2><div class="cards">{cards}</div>')
    sections += [config_section(runs), rollout_section(runs)]
    if title is None:
        title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    written = time.strftime("%Y-%m-%d %H:%M")
    subtitle = f"Power-mean policy optimization. {', '.join(run.label for run in runs)}. Written {written}."
    return page(title, subtitle, "\n".join(sections))


def _links(token_pages: Mapping[str, str]) -> str:
    links = ", ".join(f'<a href="{escape(quote(path))}">{escape(label)}</a>' for label, path in token_pages.items())
    return f'<p class="note">Which tokens carry the gradient, trajectory by trajectory: {links}</p>' if links else ""


def summary_table(runs: Sequence[RunRecord]) -> str:
    """One row for each run: how far it went, what it learned, how fast."""
    header = ("run", "steps", "reward, first to last", "held-out, first to last", "p, last", "tokens/s", "time")
    rows = []
    for index, run in enumerate(runs):
        last = run.metrics[-1]
        totals = run.series("time/total_s")[1]
        duration = totals.sum() if len(totals) else float(last.get("time", 0)) - float(run.metrics[0].get("time", 0))
        rate = run.series("throughput/tokens_per_s")[1]
        evaluations = [f"{name.removeprefix('eval/').removesuffix('_mean')} {ends(run, name)}" for name in held_out(run)]
        wanted = run.description.get("total_steps")
        cells = [
            f'<span class="dot" style="background: var(--series-{index % NUM_SERIES + 1})"></span>{escape(run.label)}',
            f"{last['step']}" + (f" of {wanted}" if wanted else ""),
            ends(run, "reward/mean"),
            escape("; ".join(evaluations)) or "-",
            ends(run, "objective/p_mean", last_only=True),
            format_count(float(np.nanmedian(rate))) if len(rate) else "-",
            format_seconds(float(duration)),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in header)}</tr>{''.join(rows)}</table>"


def source_section(runs: Sequence[RunRecord]) -> str:
    """One row for each source of each run that has several: what it learned there, and what p did."""
    columns = (
        ("held-out, first to last", "eval/{}/accuracy_mean", False),
        ("greedy, first to last", "eval/{}/greedy_accuracy_mean", False),
        ("reward, first to last", "source/{}/reward_mean", False),
        ("p, last", "source/{}/p_mean", True),
        ("ESS / tokens, last", "source/{}/ess_fraction", True),
        ("clipped / tokens, last", "source/{}/clip_fraction", True),
    )
    rows = []
    for run in runs:
        for name in dict.fromkeys([*sources(run, "source", "reward_mean"), *sources(run, "eval", "accuracy_mean")]):
            cells = [run.label, name, *(ends(run, metric.format(name), last_only=last) for _, metric, last in columns)]
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{heading}</th>" for heading in ("run", "source", *(heading for heading, *_ in columns)))
    return f'<h2>Sources</h2><div class="card"><table><tr>{header}</tr>{"".join(rows)}</table></div>' if rows else ""


def ends(run: RunRecord, name: str, *, last_only: bool = False) -> str:
    """First and last value of a metric; training metrics are noisy, so a mean over a twentieth of the steps."""
    values = run.series(name)[1]
    values = values[np.isfinite(values)]
    if not len(values):
        return "-"
    share = 1 if name.startswith("eval/") else max(1, len(values) // 20)
    last = f"{values[-share:].mean():.3f}"
    return last if last_only else f"{values[:share].mean():.3f} → {last}"


def config_section(runs: Sequence[RunRecord]) -> str:
    """The settings: those that differ between runs first, all of them folded."""
    configs = [run.config for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    differing = [name for name in names if len({str(config.get(name)) for config in configs}) > 1]
    parts = ["<h2>Configuration</h2>"]
    if differing:
        parts.append(f'<p class="note">What differs:</p><div class="card">{_config_table(runs, differing)}</div>')
    if names:
        parts.append(f"<details><summary>All {len(names)} settings</summary>{_config_table(runs, names)}</details>")
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.description.get("versions", {}).items())
        started, resumed = run.description.get("started", "?"), len(run.description.get("resumed", []))
        text = f"{run.label}: started {started}, resumed {resumed} times. {versions}"
        parts.append(f'<p class="note">{escape(text)}</p>')
    return "".join(parts)


def _config_table(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(run.label)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{escape(str(run.config.get(name, '-')))}</td>" for run in runs) + "</tr>"
        for name in names
    )
    return f"<table><tr><th>setting</th>{head}</tr>{rows}</table>"


def rollout_section(runs: Sequence[RunRecord]) -> str:
    """The last saved responses of each run, folded."""
    parts = []
    for run in runs:
        for rollout in reversed(run.rollouts[-MAX_ROLLOUTS:]):
            reward, step = rollout.get("reward", "?"), rollout["step"]
            head = f"{run.label}, {run.step_name} {step}, reward {reward}: {str(rollout.get('prompt', ''))[-80:]}"
            fields = "".join(
                f'<span class="label">{escape(key)}</span><pre>{escape(str(value))}</pre>'
                for key, value in rollout.items()
                if key != "step"
            )
            parts.append(f"<details><summary>{escape(head)}</summary>{fields}</details>")
    return "<h2>Sample rollouts</h2>" + "".join(parts) if parts else ""
