"""What a study's results say: paired differences over seeds, curves with confidence bands, heat maps, collapsed runs.

Every statement about a difference comes from the seeds' spread: Student's paired t-test against the reference variant over
the seeds that both have, corrected for the number of comparisons (Holm, 1979).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
from scipy import stats

from pmpo_megatron.checkpoint.files import replace_text
from pmpo_megatron.errors import DataError
from pmpo_megatron.monitor.comparison_plots import curve_pictures, ess_against_p, heat_maps, source_pictures
from pmpo_megatron.monitor.page import page, picture_file
from pmpo_megatron.monitor.study import COLLAPSE, GREEDY, OF_SOURCES, REWARD, SAMPLED, UPDATES, StudyConfig, Variant, of_source

CONFIDENCE = 0.95
SEEDS = 3  # in common, from which differences are tested
ROUNDING = 1e-5  # of accuracies; results have six digits
QUANTITIES = (
    ("final greedy accuracy", GREEDY, "last"),
    ("final sampled accuracy", SAMPLED, "last"),
    ("sampled accuracy over the whole run", SAMPLED, "mean"),
)
COLUMNS = (
    ("p", "objective/p_mean", "mean"),
    ("p, 5%", "objective/p_q05", "mean"),
    ("p, 95%", "objective/p_q95", "mean"),
    ("ESS / tokens", "objective/ess_fraction", "mean"),
    ("clipped", "objective/clip_fraction", "mean"),
    ("gradient norm", UPDATES, "mean"),
    ("its 99th percentile", UPDATES, "q99"),
    ("its maximum", UPDATES, "max"),
    ("staleness", "rollout/staleness", "mean"),
    ("seconds a round", "time/total_s", "mean"),
)


@dataclass(frozen=True)
class Verdict:
    """A variant against its reference in one quantity. ``p_value`` is corrected for the number of comparisons."""

    name: str
    reference: str
    seeds: int
    difference: float
    low: float
    high: float
    p_value: float

    @property
    def differs(self) -> bool:
        return self.p_value < 1 - CONFIDENCE

    def sentence(self, quantity: str) -> str:
        interval = f"{self.difference:+.3f}, {CONFIDENCE:.0%} interval [{self.low:+.3f}, {self.high:+.3f}]"
        if self.differs:
            word = "better" if self.difference > 0 else "worse"
            return f"{self.name}: {word} than {self.reference} in {quantity} ({interval}; p = {self.p_value:.2g})"
        return f"{self.name}: not told apart from {self.reference} in {quantity} by {self.seeds} seeds ({interval})"


def interval_of_mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, half-width of its confidence interval) over axis 0, by Student's t; NaN half-width for one value."""
    count = len(values)
    if count < 2:
        return values.mean(0), np.full(values.shape[1:], np.nan)
    error = values.std(0, ddof=1) / np.sqrt(count)
    return values.mean(0), error * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)


def compare(pairs: Sequence[tuple[str, dict[int, float], str, dict[int, float]]]) -> list[Verdict]:
    """Paired t-tests, Holm-corrected, of (name, value by seed, reference's name, its values) over the seeds of both.

    A pair with fewer than three seeds in common has no verdict, and one whose differences are equal does not differ: shares of
    a hundred problems are coarse, so that few seeds may agree by chance, which Student's t would take for certainty.
    """
    verdicts = []
    for name, values, reference, base in pairs:
        seeds = sorted(values.keys() & base.keys())
        if len(seeds) < SEEDS:
            continue
        difference = np.array([values[seed] - base[seed] for seed in seeds])
        mean, half = interval_of_mean(difference)
        p_value = float(stats.ttest_1samp(difference, 0.0).pvalue) if np.ptp(difference) > ROUNDING else 1.0
        verdicts.append(Verdict(name, reference, len(seeds), float(mean), float(mean - half), float(mean + half), p_value))
    return _holm(verdicts)


def _holm(verdicts: list[Verdict]) -> list[Verdict]:
    corrected, largest = [0.0] * len(verdicts), 0.0
    for rank, index in enumerate(sorted(range(len(verdicts)), key=lambda i: verdicts[i].p_value)):
        largest = max(largest, min(1.0, verdicts[index].p_value * (len(verdicts) - rank)))
        corrected[index] = largest
    return [replace(verdict, p_value=value) for verdict, value in zip(verdicts, corrected, strict=True)]


def write_comparison(study: StudyConfig, variants: Sequence[Variant], out: Path) -> list[str]:
    """Writes the page about ``variants`` to ``out``, its pictures to ``pictures`` beside it; returns its verdicts.

    Raises:
        DataError: there is none.
    """
    if not variants:
        raise DataError(f"{out.parent}: no run is finished yet")
    sentences = verdict_sentences(study, variants)
    counts = sorted({len(variant.runs) for variant in variants})
    seeds = f"{counts[0]} seeds each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    subtitle = (
        f"{len(variants)} variants, {seeds}, {study.rounds} rounds each. Lines are means, bands {CONFIDENCE:.0%} intervals of "
        f"the mean by Student's t. Written {time.strftime('%Y-%m-%d %H:%M')}."
    )
    verdicts = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    sections = [
        f'<h2>Summary</h2><div class="card">{summary(variants)}</div><p class="note">{escape(COLLAPSE)}</p>',
        f'<h2>What differs and what does not</h2><div class="card"><ul>{verdicts}</ul></div>',
    ]
    sections += [f'<h2>By source</h2><div class="card">{source_summary(study, variants)}</div>'] if study.sources else []
    for heading, pictures in (
        ("Heat maps", heat_maps(study, variants, QUANTITIES)),
        ("Sources beside each other", source_pictures(study, variants, interval_of_mean)),
        ("p as an inverse temperature", ess_against_p(variants)),
        ("Curves", curve_pictures(study, variants, interval_of_mean)),
    ):
        cards = "".join(f'<div class="card">{svg}</div>' for svg in pictures.values())
        for name, svg in pictures.items():
            (out.parent / "pictures").mkdir(parents=True, exist_ok=True)
            replace_text(out.parent / "pictures" / f"{name}.svg", picture_file(svg))
        sections += [f'<h2>{heading}</h2><div class="cards">{cards}</div>'] if pictures else []
    replace_text(out, page(study.title, subtitle, "\n".join(sections)))
    return sentences


def verdict_sentences(study: StudyConfig, variants: Sequence[Variant]) -> list[str]:
    """One sentence for every variant and quantity, also of each source, that at least three seeds say something about."""
    by_levels, sentences = {variant.levels: variant for variant in variants}, []
    of_sources = [
        (f"{name} in {s}", of_source(metric, s), reduce) for s in study.sources for name, metric, reduce in QUANTITIES
    ]
    for quantity, metric, reduce in (*QUANTITIES, *of_sources):
        pairs = []
        for variant in variants:
            reference = by_levels.get(study.reference_of(variant.levels))
            if reference is not None and reference is not variant:
                values = (v.by_seed(metric, reduce) for v in (variant, reference))
                pairs.append((variant.name, next(values), reference.name, next(values)))
        sentences += [verdict.sentence(quantity) for verdict in compare(pairs)]
    return sentences or ["No variant shares three seeds with its reference: nothing can be said about differences."]


def summary(variants: Sequence[Variant]) -> str:
    """One row for each variant."""
    rows = []
    for variant in variants:
        collapsed = variant.collapsed()
        cells = [variant.name, str(len(variant.runs)), f"{sum(collapsed.values())} of {len(collapsed)}"]
        rows.append(cells + [_cell(variant.by_seed(metric, reduce)) for _, metric, reduce in (*QUANTITIES, *COLUMNS)])
    return _table(["variant", "seeds", "collapsed", *(name for name, *_ in (*QUANTITIES, *COLUMNS))], rows)


def source_summary(study: StudyConfig, variants: Sequence[Variant]) -> str:
    """One row for each source and variant; what was measured in training only where the variant was trained on the source."""
    known = (("greedy accuracy before", GREEDY, "first"), *QUANTITIES, ("reward over the run", REWARD, "mean"), *COLUMNS)
    columns = [column for column in known if column[1] in OF_SOURCES]
    rows = [
        [source, variant.name, *(_cell(variant.by_seed(of_source(metric, source), reduce)) for _, metric, reduce in columns)]
        for source in study.sources
        for variant in variants
    ]
    return _table(["source", "variant", *(name for name, *_ in columns)], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>{''.join(lines)}</table>"


def _cell(by_seed: dict[int, float]) -> str:
    if not by_seed:
        return "-"
    mean, half = interval_of_mean(np.array([*by_seed.values()]))
    return f"{mean:.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "")
