"""One self-contained HTML page about one run or several: plots, configuration, sample rollouts. Works offline."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from pmpo_megatron.monitor.plots import PLOTS, held_out
from pmpo_megatron.monitor.progress import format_count, format_seconds
from pmpo_megatron.monitor.read import RunRecord, read_runs
from pmpo_megatron.monitor.style import DARK, LIGHT, NUM_SERIES, css_variables

MAX_ROLLOUTS = 12  # shown of each run, the last ones

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", sans-serif;
  --page: #f5f5f2; --card: #ffffff; --ink: #1c1c1a; --muted: #6a6a66; --grid: #e4e4df; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{
  --page: #161615; --card: #20201f; --ink: #ecece8; --muted: #a3a39d; --grid: #383836; {dark} }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; max-width: 1180px; padding: 2rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 var(--font) }}
h1 {{ margin: 0; font-size: 1.6rem }} h2 {{ margin: 2.2rem 0 .8rem; font-size: 1.15rem }} p.note {{ color: var(--muted) }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem }}
.card {{ background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: .8rem; overflow-x: auto }}
.card svg {{ width: 100%; height: auto; display: block }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--grid); vertical-align: top }}
th {{ color: var(--muted); font-weight: 600 }} td.n, th.n {{ text-align: right }}
.dot {{ display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }}
details {{ margin: .4rem 0 }} summary {{ cursor: pointer }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font-size: 13px }} .label {{ color: var(--muted) }}
</style></head><body>
<h1>{title}</h1><p class="note">{subtitle}</p>
{body}
</body></html>
"""


def write_report(runs: Sequence[str | Path], out: str | Path, *, title: str | None = None) -> Path:
    """Writes the page about ``runs`` (their directories) to ``out``, replacing it in one step.

    Raises:
        DataError: a directory is no run, or its record is damaged.
    """
    records = read_runs([Path(run) for run in runs])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(render(records, title=title), encoding="utf-8")
    os.replace(temporary, out)
    return out


def render(runs: Sequence[RunRecord], *, title: str | None = None) -> str:
    """The page as text."""
    sections = [f'<h2>Summary</h2><div class="card">{summary_table(runs)}</div>']
    for heading, plots in PLOTS.items():
        if pictures := [svg for plot in plots if (svg := plot(runs)) is not None]:
            cards = "".join(f'<div class="card">{svg}</div>' for svg in pictures)
            sections.append(f'<h2>{heading}</h2><div class="cards">{cards}</div>')
    sections += [config_section(runs), rollout_section(runs)]
    if title is None:
        title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    written = time.strftime("%Y-%m-%d %H:%M")
    return PAGE.format(
        title=escape(title),
        subtitle=escape(f"Power-mean policy optimization. {', '.join(run.label for run in runs)}. Written {written}."),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        body="\n".join(sections),
    )


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
