"""The pictures of a report. Each takes runs and gives SVG text, or None where no run measured the quantity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pmpo_megatron.monitor.read import RunRecord
from pmpo_megatron.monitor.style import color, figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Sequence[RunRecord]
MAX_POINTS = 1500  # of a scatter plot, over all runs
STYLES = ("-", ":", "--", "-.")
LAST_ROUNDS = 10  # that the map of experts adds up
WINDOW = 0.05  # of a run's steps: width of the moving mean


def reward(runs: Runs) -> str | None:
    """Mean reward of the training rollouts (moving mean over the values) and of held-out problems (marked)."""
    with figure(9.5, 3.8) as (drawn, axes):
        for index, run in enumerate(runs):
            steps, values = run.series("reward/mean")
            axes.plot(steps, values, color=color(index), alpha=0.25, linewidth=1)
            axes.plot(steps, moving_mean(values), color=color(index), label=f"{run.label}: training")
            for style, name in zip(STYLES, held_out(run), strict=False):
                steps, values = run.series(name)
                label = f"{run.label}: held-out {name.removeprefix('eval/').removesuffix('_mean')}"
                axes.plot(
                    steps, values, style, color=color(index), marker="o", markersize=4, linewidth=1, alpha=0.9, label=label
                )
        return _finish(drawn, axes, runs, title="Mean reward", name="reward", ylabel="reward", always_legend=True)


def held_out(run: RunRecord) -> list[str]:
    """The evaluation curves of a run over all sources: means of accuracies, not of lengths."""
    names = [name for name in run.names("eval/", "_mean") if name.count("/") == 1]
    return [name for name in names if "length" not in name and "truncated" not in name and "token" not in name]


def exponent(runs: Runs) -> str | None:
    """How p is distributed over trajectories: median, middle half, and (one run) 5% to 95%."""
    with figure() as (drawn, axes):
        for index, run in enumerate(runs):
            steps, median = run.series("objective/p_q50")
            bands = [("objective/p_q25", "objective/p_q75", 0.28)]
            if len(runs) == 1:
                bands.append(("objective/p_q05", "objective/p_q95", 0.14))
            for low, high, alpha in bands:
                (steps_low, lower), (_, upper) = run.series(low), run.series(high)
                if len(lower) and len(lower) == len(upper):
                    axes.fill_between(steps_low, lower, upper, color=color(index), alpha=alpha, linewidth=0)
            axes.plot(steps, median, color=color(index), label=f"{run.label}: median")
            steps, mean = run.series("objective/p_mean")
            axes.plot(steps, mean, "--", color=color(index), linewidth=1.2, label=f"{run.label}: mean")
        title = "p over trajectories: median, middle half" + (", 5% to 95%" if len(runs) == 1 else "")
        return _finish(drawn, axes, runs, title=title, name="p-distribution", ylabel="p", always_legend=True)


def exponent_map(runs: Runs) -> str | None:
    """One run: share of trajectories at each p, step by step."""
    if len(runs) != 1 or not (records := [r for r in runs[0].trajectories if r.get("p")]):
        return None
    values = [np.asarray(record["p"], dtype=np.float64) for record in records]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    low, high = min(low, 0.0), max(high, 1.0)
    edges = np.linspace(low, high, 26)
    groups = np.array_split(np.arange(len(records)), min(len(records), 60))
    with figure() as (drawn, axes):
        for group in groups:
            counts, _ = np.histogram(np.concatenate([values[i] for i in group]), edges)
            first, last = records[group[0]]["step"] - 0.5, records[group[-1]]["step"] + 0.5
            for share, bottom, top in zip(counts / max(1, counts.sum()), edges[:-1], edges[1:], strict=True):
                if share > 0.002:
                    area = ([first, last], bottom, top)
                    axes.fill_between(*area, color=color(0), alpha=min(1.0, float(share) ** 0.6), linewidth=0)
        return _finish(drawn, axes, runs, title="Share of trajectories at each p", name="p-map", ylabel="p")


def ess_against_clipping(runs: Runs) -> str | None:
    """One point for each trajectory: what p did to the effective sample size as tokens were clipped."""
    generator = np.random.default_rng(0)
    with figure() as (drawn, axes):
        for index, run in enumerate(runs):
            clip, ess, length = _per_trajectory(run, "clip_fraction", "ess", "length")
            ess = ess / np.maximum(length, 1)
            chosen = generator.permutation(len(clip))[: MAX_POINTS // len(runs)]
            axes.plot(clip[chosen], ess[chosen], "o", color=color(index), markersize=3, alpha=0.35, mec="none", label=run.label)
        axes.set_xlabel("clipped tokens / tokens")
        return _finish(drawn, axes, runs, title="ESS against clip fraction", name="ess-clip", ylabel="ESS / tokens", x=False)


def ess_against_target(runs: Runs) -> str | None:
    """Mean ESS, and the mean target that the rule set, over the steps."""
    with figure() as (drawn, axes):
        for index, run in enumerate(runs):
            axes.plot(*run.series("objective/ess_fraction"), color=color(index), label=f"{run.label}: achieved")
            axes.plot(*run.series("objective/ess_target"), ":", color=color(index), label=f"{run.label}: target")
        title = "Effective sample size, achieved and wanted"
        return _finish(drawn, axes, runs, title=title, name="ess-target", ylabel="ESS / tokens", always_legend=True)


def exponent_against_length(runs: Runs) -> str | None:
    """One point for each trajectory: p against the response's length."""
    generator = np.random.default_rng(0)
    with figure() as (drawn, axes):
        for index, run in enumerate(runs):
            length, p = _per_trajectory(run, "length", "p")
            chosen = generator.permutation(len(length))[: MAX_POINTS // len(runs)]
            axes.plot(length[chosen], p[chosen], "o", color=color(index), markersize=3, alpha=0.35, mec="none", label=run.label)
        axes.set_xlabel("response length [tokens]")
        return _finish(drawn, axes, runs, title="p against length", name="p-length", ylabel="p", x=False)


def lengths(runs: Runs) -> str | None:
    """Mean response length, and (one run) 5% to 95% where they were measured."""
    with figure() as (drawn, axes):
        for index, run in enumerate(runs):
            steps, mean = run.series("rollout/length_mean")
            (_, lower), (_, upper) = run.series("rollout/length_q05"), run.series("rollout/length_q95")
            if len(runs) == 1 and len(lower) == len(steps) == len(upper):
                axes.fill_between(steps, lower, upper, color=color(index), alpha=0.15, linewidth=0)
            axes.plot(steps, mean, color=color(index), label=run.label)
        return _finish(drawn, axes, runs, title="Response length", name="lengths", ylabel="tokens")


def expert_map(runs: Runs) -> str | None:
    """One run of a mixture of experts: what each expert got of its layer's tokens in the last rounds; 1 is an equal share."""
    if len(runs) != 1 or not runs[0].experts:
        return None
    records = runs[0].experts[-LAST_ROUNDS:]
    layers = [name for name in records[-1] if name != "step"]
    tokens = np.array([[record[layer] for layer in layers] for record in records], dtype=np.float64).sum(axis=0)
    with figure() as (drawn, axes):
        mesh = axes.pcolormesh(tokens / tokens.mean(axis=1, keepdims=True), cmap="cividis", vmin=0.0, rasterized=True)
        drawn.colorbar(mesh, ax=axes)
        axes.grid(False)
        axes.set_yticks(np.arange(len(layers)) + 0.5, layers)
        axes.set_xlabel("expert")
        title = f"Tokens of each expert over an equal share, last {len(records)} {runs[0].step_name}s"
        return _finish(drawn, axes, runs, title=title, name="experts", ylabel="layer", x=False)


def phases(runs: Runs) -> str | None:
    """Where the time goes: over the steps of one run, or the mean of each of several."""
    names = list(dict.fromkeys(n for run in runs for n in run.names("time/", "_s") if n != "time/total_s"))
    if not names:
        return None
    labels = [name[5:-2].replace("_", " ") for name in names]
    if len(runs) > 1:
        return _phase_bars(runs, names, labels)
    with figure() as (drawn, axes):
        records = [record for record in runs[0].metrics if any(name in record for name in names)]
        steps = [record["step"] for record in records]
        stacked = [[float(record.get(name, 0.0)) for record in records] for name in names]
        if len(steps) == 1:  # an area needs two points
            steps, stacked = [steps[0] - 0.5, steps[0] + 0.5], [values * 2 for values in stacked]
        colors = [color(i) for i in range(len(names))]
        axes.stackplot(steps, *stacked, colors=colors, labels=labels, alpha=0.8, linewidth=0)
        return _finish(drawn, axes, runs, title="Time per phase", name="phases", ylabel="s", always_legend=True)


def _phase_bars(runs: Runs, names: Sequence[str], labels: Sequence[str]) -> str | None:
    with figure(6.2, 1.3 + 0.45 * len(runs)) as (drawn, axes):
        left = np.zeros(len(runs))
        for index, (name, label) in enumerate(zip(names, labels, strict=True)):
            series = [run.series(name)[1] for run in runs]
            means = np.array([values.mean() if len(values) else 0.0 for values in series])
            axes.barh([run.label for run in runs], means, left=left, color=color(index), alpha=0.8, label=label, height=0.6)
            left += means
        axes.invert_yaxis()
        axes.set_xlabel("s, mean over steps")
        return _finish(drawn, axes, runs, title="Time per phase", name="phases", ylabel="", x=False, always_legend=True)


def line(name: str, title: str, ylabel: str, *, log: bool = False) -> Callable[[Runs], str | None]:
    """A plot of one metric over the steps."""

    def plot(runs: Runs) -> str | None:
        with figure() as (drawn, axes):
            for index, run in enumerate(runs):
                steps, values = run.series(name)
                axes.plot(steps, values, color=color(index), label=run.label)
            shown = np.concatenate([entry.get_ydata() for entry in axes.lines]) if axes.lines else np.array([])
            if log and shown.size and np.nanmin(shown) > 0:
                axes.set_yscale("log")
            return _finish(drawn, axes, runs, title=title, name=name.replace("/", "-"), ylabel=ylabel)

    return plot


def by_source(quantity: str, title: str, ylabel: str, *, section: str = "source") -> Callable[[Runs], str | None]:
    """A plot of ``<section>/<name>/<quantity>`` over the steps, a line for each source."""

    def plot(runs: Runs) -> str | None:
        with figure() as (drawn, axes):
            for index, run in enumerate(runs):
                for number, source in enumerate(sources(run, section, quantity)):
                    steps, values = run.series(f"{section}/{source}/{quantity}")
                    shade, style = (color(number), "-") if len(runs) == 1 else (color(index), STYLES[number % len(STYLES)])
                    label = source if len(runs) == 1 else f"{run.label}: {source}"
                    axes.plot(steps, moving_mean(values), style, color=shade, label=label)
            return _finish(drawn, axes, runs, title=title, name=f"{section}-{quantity}", ylabel=ylabel, always_legend=True)

    return plot


def sources(run: RunRecord, section: str, quantity: str) -> list[str]:
    """Sources of which ``<section>/<name>/<quantity>`` was measured."""
    names = (name.split("/") for name in run.names(f"{section}/", f"/{quantity}"))
    return [parts[1] for parts in names if len(parts) == 3]


def moving_mean(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over `WINDOW` of the values; ends use what is there; NaN counts nowhere."""
    half = max(1, round(len(values) * WINDOW)) // 2
    known = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (totals[last] - totals[first]) / (counts[last] - counts[first])


def _per_trajectory(run: RunRecord, *names: str) -> tuple[np.ndarray, ...]:
    records = [record for record in run.trajectories if all(name in record for name in names)]
    return tuple(
        np.concatenate([np.asarray(record[name], dtype=np.float64) for record in records]) if records else np.array([])
        for name in names
    )


def _finish(
    drawn: Figure,
    axes: Axes,
    runs: Runs,
    *,
    title: str,
    name: str,
    ylabel: str,
    x: bool = True,
    always_legend: bool = False,
) -> str | None:
    """Title, labels and legend; None where nothing was drawn."""
    drawn_points = sum(np.isfinite(entry.get_ydata()).sum() for entry in axes.lines)
    if not drawn_points and not axes.patches and not axes.collections:
        return None
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    if x:
        axes.set_xlabel(runs[0].step_name)
        axes.locator_params(axis="x", integer=True)
    if always_legend or len(runs) > 1:
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return to_svg(drawn, name)


PLOTS: dict[str, tuple[Callable[[Runs], str | None], ...]] = {
    "Learning": (reward,),
    "Power-mean order": (exponent, exponent_map, ess_against_clipping, exponent_against_length),
    "By source": (
        by_source("accuracy_mean", "Held-out accuracy of each source", "accuracy", section="eval"),
        by_source("p_mean", "Mean p of each source (moving mean)", "p"),
        by_source("reward_mean", "Mean reward of each source (moving mean)", "reward"),
        by_source("ess_fraction", "Effective sample size of each source (moving mean)", "ESS / tokens"),
        by_source("clip_fraction", "Clipped tokens of each source (moving mean)", "clipped / tokens"),
    ),
    "Objective": (
        ess_against_target,
        line("objective/clip_fraction", "Clipped tokens", "clipped / tokens"),
        line("policy/grad_norm", "Gradient norm", "norm", log=True),
        line("policy/entropy", "Entropy of the policy", "nats / token"),
        line("objective/loss", "Loss", "loss"),
        line("policy/kl_reference", "KL from the reference", "nats / token"),
    ),
    "Rollouts": (
        lengths,
        line("rollout/truncated_fraction", "Responses cut off at the token limit", "share"),
        line("mismatch/mean_abs", "Trainer against engine: mean |log-prob difference|", "nats", log=True),
        line("mismatch/max_abs", "Trainer against engine: largest difference", "nats", log=True),
    ),
    "Experts": (
        expert_map,
        line("routing/busiest_expert", "Tokens of the busiest expert of a layer, mean over layers", "times an equal share"),
        line("routing/unused_experts", "Experts without a token", "share"),
        line("routing/other_than_engine", "Tokens that the router would send elsewhere than the engine did", "share"),
    ),
    "Speed": (phases, line("throughput/tokens_per_s", "Throughput", "tokens / s")),
}
