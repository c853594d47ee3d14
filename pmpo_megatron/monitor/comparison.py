"""Variants compared over several seeds each: curves with confidence bands, and a verdict that says what is not known.

Runs lie in ``ROOT/<variant>/seed-<n>``. Every statement about a difference comes from the seeds' spread: Welch's t-test
against the reference variant, corrected for the number of comparisons (Holm, 1979).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
from scipy import stats

from pmpo_megatron.errors import DataError
from pmpo_megatron.monitor.read import RunRecord, read_run
from pmpo_megatron.monitor.report import PAGE
from pmpo_megatron.monitor.style import DARK, LIGHT, NUM_SERIES, color, css_variables, figure, to_svg

CONFIDENCE = 0.95
HELD_OUT = "eval/accuracy_mean"
CURVES = (
    (HELD_OUT, "Held-out accuracy", "accuracy"),
    ("reward/mean", "Reward in training", "reward"),
    ("objective/p_mean", "p, mean over trajectories", "p"),
    ("objective/ess_fraction", "Effective sample size", "ESS / tokens"),
    ("objective/clip_fraction", "Clipped tokens", "clipped / tokens"),
    ("policy/grad_norm", "Gradient norm", "norm"),
    ("policy/entropy", "Entropy", "nats / token"),
    ("rollout/length_mean", "Response length", "tokens"),
)


@dataclass(frozen=True)
class Variant:
    """One setting and its runs, which differ in their seeds alone."""

    name: str
    runs: tuple[RunRecord, ...]

    def curves(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [S], values [runs, S]) at the steps that all runs have; empty where a run lacks the metric."""
        series = [dict(zip(*(a.tolist() for a in run.series(metric)), strict=True)) for run in self.runs]
        steps = sorted(set.intersection(*(set(points) for points in series)))
        return np.array(steps), np.array([[points[step] for step in steps] for points in series])

    def final(self) -> np.ndarray:
        """Held-out accuracy after the last round, one value for each seed."""
        return self.curves(HELD_OUT)[1][:, -1]

    def overall(self) -> np.ndarray:
        """Held-out accuracy, mean over all evaluations: high where learning is fast as well as good."""
        return self.curves(HELD_OUT)[1].mean(1)


@dataclass(frozen=True)
class Verdict:
    """A variant against the reference in one quantity. ``p_value`` is corrected for the number of comparisons.

    ``seeds`` is the smaller number of theirs.
    """

    name: str
    seeds: int
    difference: float
    low: float
    high: float
    p_value: float

    @property
    def differs(self) -> bool:
        return self.p_value < 1 - CONFIDENCE

    def sentence(self, reference: str, quantity: str) -> str:
        interval = f"{self.difference:+.3f}, {CONFIDENCE:.0%} interval [{self.low:+.3f}, {self.high:+.3f}]"
        if self.differs:
            word = "better" if self.difference > 0 else "worse"
            return f"{self.name}: {word} than {reference} in {quantity} ({interval}; p = {self.p_value:.2g})"
        return f"{self.name}: not told apart from {reference} in {quantity} by {self.seeds} seeds ({interval})"


def read_variants(root: Path) -> list[Variant]:
    """Every variant in ``root``, in the order of their directories' names.

    Raises:
        DataError: there is none, or a run is damaged or has no held-out accuracy.
    """
    names = sorted({path.parent.parent.name for path in root.glob("*/seed-*/metrics.jsonl")})
    if not names:
        raise DataError(f"{root}: holds no <variant>/seed-<n> with a metrics.jsonl")
    found = []
    for name in names:
        directories = sorted(path.parent for path in (root / name).glob("seed-*/metrics.jsonl"))
        runs = tuple(read_run(path, label=f"{name} {path.name}") for path in directories)
        for run in runs:
            if HELD_OUT not in run.names("eval/"):
                raise DataError(f"{run.directory}: has no {HELD_OUT}; give the runs evaluation.data")
        found.append(Variant(name, runs))
    return found


def interval_of_mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, half-width of its confidence interval) over axis 0, by Student's t; NaN half-width for one value."""
    count = len(values)
    if count < 2:
        return values.mean(0), np.full(values.shape[1:], np.nan)
    error = values.std(0, ddof=1) / np.sqrt(count)
    return values.mean(0), error * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)


def compare(values: dict[str, np.ndarray], reference: str) -> list[Verdict]:
    """Welch's t-test of every other entry of ``values`` against ``reference``, Holm-corrected; none with one seed."""
    base, verdicts = values[reference], []
    for name, other in values.items():
        seeds = min(len(base), len(other))
        if name == reference or seeds < 2:
            continue
        difference = float(other.mean() - base.mean())
        if other.std() == base.std() == 0:
            verdicts.append(Verdict(name, seeds, difference, difference, difference, float(difference == 0)))
            continue
        test = stats.ttest_ind(other, base, equal_var=False)
        low, high = test.confidence_interval(CONFIDENCE)
        verdicts.append(Verdict(name, seeds, difference, float(low), float(high), float(test.pvalue)))
    return _holm(verdicts)


def _holm(verdicts: list[Verdict]) -> list[Verdict]:
    corrected, largest = {}, 0.0
    for rank, verdict in enumerate(sorted(verdicts, key=lambda v: v.p_value)):
        largest = max(largest, min(1.0, verdict.p_value * (len(verdicts) - rank)))
        corrected[verdict.name] = largest
    return [replace(v, p_value=corrected[v.name]) for v in verdicts]


def write_comparison(root: Path, out: Path, *, reference: str, title: str) -> list[str]:
    """Writes the page about the variants in ``root`` to ``out``; returns its verdicts as sentences.

    Raises:
        DataError: see `read_variants`; or ``reference`` is none of the variants.
    """
    variants = read_variants(root)
    if reference not in [variant.name for variant in variants]:
        raise DataError(f"{root}: has no variant {reference!r}; it has {', '.join(v.name for v in variants)}")
    sentences = _sentences(variants, reference)
    counts = sorted({len(variant.runs) for variant in variants})
    seeds = f"{counts[0]} seeds each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    verdicts = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    pictures = [svg for metric, heading, label in CURVES if (svg := _picture(variants, metric, heading, label))]
    cards = "".join(f'<div class="card">{svg}</div>' for svg in pictures)
    page = PAGE.format(
        title=escape(title),
        subtitle=escape(
            f"{len(variants)} variants, {seeds}, equal budget. Lines are means, bands {CONFIDENCE:.0%} intervals of "
            f"the mean by Student's t. Written {time.strftime('%Y-%m-%d %H:%M')}."
        ),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        body=f'<h2>Summary</h2><div class="card">{_table(variants)}</div><h2>What differs and what does not</h2>'
        f'<div class="card"><ul>{verdicts}</ul></div><h2>Curves</h2><div class="cards">{cards}</div>',
    )
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
    return sentences


def _sentences(variants: Sequence[Variant], reference: str) -> list[str]:
    found = [
        verdict.sentence(reference, quantity)
        for quantity, values in (
            ("final accuracy", {v.name: v.final() for v in variants}),
            ("accuracy over the whole run", {v.name: v.overall() for v in variants}),
        )
        for verdict in compare(values, reference)
    ]
    if not found:
        return ["One seed each: nothing can be said about differences."]
    single = [variant.name for variant in variants if len(variant.runs) == 1]
    return [*found, *(f"{name}: one seed, nothing can be said about it." for name in single)]


def _table(variants: Sequence[Variant]) -> str:
    rows = []
    for index, variant in enumerate(variants):
        cells = [_dot(index) + escape(variant.name), str(len(variant.runs)), _cell(variant.final()), _cell(variant.overall())]
        for metric in ("objective/p_mean", "objective/ess_fraction", "objective/clip_fraction", "policy/grad_norm"):
            values = variant.curves(metric)[1]
            cells.append(_cell(values.mean(1)) if values.size else "-")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    names = ("variant", "seeds", "final accuracy", "over the run", "p", "ESS / tokens", "clipped", "gradient norm")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{''.join(rows)}</table>"


def _dot(index: int) -> str:
    return f'<span class="dot" style="background: var(--series-{index % NUM_SERIES + 1})"></span>'


def _cell(values: np.ndarray) -> str:
    mean, half = interval_of_mean(values)
    return f"{mean:.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "")


def _picture(variants: Sequence[Variant], metric: str, heading: str, label: str) -> str | None:
    drawn_any = False
    with figure() as (drawn, axes):
        for index, variant in enumerate(variants):
            steps, values = variant.curves(metric)
            if not values.size:
                continue
            mean, half = interval_of_mean(values)
            axes.plot(steps, mean, color=color(index), label=variant.name)
            if np.isfinite(half).all():
                axes.fill_between(steps, mean - half, mean + half, color=color(index), alpha=0.15, linewidth=0)
            drawn_any = True
        axes.set_title(heading)
        axes.set_ylabel(label)
        axes.set_xlabel(variants[0].runs[0].step_name)
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return to_svg(drawn, metric.replace("/", "-")) if drawn_any else None
