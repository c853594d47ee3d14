"""The pictures of a study: curves with confidence bands, heat maps over two axes, and ESS against p. SVG text, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pmpo_megatron.monitor.study import GREEDY, OF_SOURCES, REWARD, SAMPLED, StudyConfig, Variant, of_source
from pmpo_megatron.monitor.style import NUM_SERIES, color, figure, to_svg

CURVES = (
    (GREEDY, "Held-out accuracy, greedy", "accuracy"),
    (SAMPLED, "Held-out accuracy, sampled", "accuracy"),
    (REWARD, "Reward in training", "reward"),
    ("objective/p_mean", "p, mean over trajectories", "p"),
    ("objective/ess_fraction", "Effective sample size", "ESS / tokens"),
    ("objective/clip_fraction", "Clipped tokens", "clipped / tokens"),
    ("policy/grad_norm", "Gradient norm", "norm"),
    ("policy/entropy", "Entropy", "nats / token"),
)


def curve_pictures(study: StudyConfig, variants: Sequence[Variant], interval: Callable) -> dict[str, str]:
    """Every curve for each set of variants that are compared with each other, where they are few enough to tell apart."""
    pictures: dict[str, str] = {}
    for reference in dict.fromkeys(study.reference_of(variant.levels) for variant in variants):
        compared = [variant for variant in variants if study.reference_of(variant.levels) == reference]
        if len(compared) > NUM_SERIES:
            continue
        for metric, heading, label in CURVES:
            name, lines = f"{metric}-{'-'.join(reference)}", {variant.name: variant.curves(metric) for variant in compared}
            pictures |= _curves(lines, f"{heading} ({'/'.join(reference)} and others)", label, name, interval)
    return pictures


def source_pictures(study: StudyConfig, variants: Sequence[Variant], interval: Callable) -> dict[str, str]:
    """Of each variant that was trained on several of the study's sources the curves of `OF_SOURCES`, a line for each."""
    pictures: dict[str, str] = {}
    for variant in variants:
        if sum(variant.curves(of_source(REWARD, source))[1].size > 0 for source in study.sources) < 2:
            continue
        for metric, heading, label in CURVES:
            if metric in OF_SOURCES:
                lines = {source: variant.curves(of_source(metric, source)) for source in study.sources}
                pictures |= _curves(lines, f"{heading} ({variant.name})", label, f"sources-{metric}-{variant.name}", interval)
    return pictures


def _curves(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]], heading: str, label: str, name: str, interval: Callable
) -> dict[str, str]:
    """``lines`` are rounds [R] and values [runs, R] by label; those without values are left out."""
    name = name.replace("/", "-")
    with figure() as (drawn, axes):
        for index, (line, (rounds, values)) in enumerate(lines.items()):
            if not values.size:
                continue
            mean, half = interval(values)
            axes.plot(rounds, mean, color=color(index), label=line)
            if np.isfinite(half).all():
                axes.fill_between(rounds, mean - half, mean + half, color=color(index), alpha=0.15, linewidth=0)
        if not axes.lines:
            return {}
        axes.set_title(heading)
        axes.set_ylabel(label)
        axes.set_xlabel("round")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return {name: to_svg(drawn, name)}


def heat_maps(study: StudyConfig, variants: Sequence[Variant], quantities: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """Mean over seeds of each quantity, and the share of collapsed runs, over the study's two axes."""
    if not study.heat_map:
        return {}
    names = list(study.axes)
    row, column = (names.index(axis) for axis in study.heat_map)
    others = [index for index in range(len(names)) if index not in (row, column)]
    pictures: dict[str, str] = {}
    for fixed in dict.fromkeys(tuple(variant.levels[i] for i in others) for variant in variants):
        shown = [variant for variant in variants if tuple(variant.levels[i] for i in others) == fixed]
        where = ", ".join(f"{names[i]} {level}" for i, level in zip(others, fixed, strict=True))
        cells: dict[str, list[dict[int, float]]] = {
            title: [v.by_seed(metric, reduce) for v in shown] for title, metric, reduce in quantities
        }
        cells["share of collapsed runs"] = [{seed: float(bad) for seed, bad in v.collapsed().items()} for v in shown]
        for title, values in cells.items():
            of_runs = {(v.levels[row], v.levels[column]): x for v, x in zip(shown, values, strict=True) if x}
            means = {levels: float(np.mean([*x.values()])) for levels, x in of_runs.items()}
            heading = title.capitalize() + (f" ({where})" if where else "")
            name = "-".join(["heat", *title.split(), *fixed])
            pictures[name] = _heat_map(study, means, heading, name)
    return pictures


def _heat_map(study: StudyConfig, means: dict[tuple[str, str], float], heading: str, name: str) -> str:
    rows, columns = ([*map(str, study.axes[axis])] for axis in study.heat_map)
    table = np.array([[means.get((r, c), np.nan) for c in columns] for r in rows], dtype=np.float64)
    with figure() as (drawn, axes):
        mesh = axes.pcolormesh(np.ma.masked_invalid(table), cmap="cividis", edgecolors="none")
        low, high = mesh.get_clim()
        for (i, j), value in np.ndenumerate(table):
            if np.isfinite(value):
                dark = high > low and (value - low) / (high - low) < 0.5
                axes.text(j + 0.5, i + 0.5, f"{value:.3f}", ha="center", va="center", color="#ffffff" if dark else "#000000")
        axes.grid(False)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.set_ylabel(study.heat_map[0])
        axes.set_xlabel(study.heat_map[1])
        axes.set_title(heading)
        return to_svg(drawn, name)


def ess_against_p(variants: Sequence[Variant]) -> dict[str, str]:
    """One point for each run: mean ESS / tokens against mean p, which is an inverse temperature: a larger one concentrates."""
    with figure() as (drawn, axes):
        for index, variant in enumerate(variants):
            p, ess = (variant.by_seed(f"objective/{name}", "mean") for name in ("p_mean", "ess_fraction"))
            seeds = sorted(p.keys() & ess.keys())
            points = [p[s] for s in seeds], [ess[s] for s in seeds]
            axes.plot(*points, "o", label=variant.name, markersize=5, alpha=0.7, mec="none", color=color(index))
        if not any(np.size(line.get_xdata()) for line in axes.lines):
            return {}
        axes.set_title("ESS against p, means over each run")
        axes.set_xlabel("p")
        axes.set_ylabel("ESS / tokens")
        if len(variants) <= NUM_SERIES:
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return {"ess-p": to_svg(drawn, "ess-p")}
