#!/usr/bin/env python3
"""Plots what the objective does with a trajectory of which more and more tokens are clipped: docs/objective.svg.

Left, the order p that the solver finds against the clip fraction, for advantages of both signs. Right, the token weights
w[t] * T, whose mean over a trajectory is 1, of tokens at given log-ratios. Log-ratios are synthetic: of 4096 tokens, a
share f lies beyond the clip bound and the others on a bell curve of std 0.15 within it. The values come from
pmpo_megatron.algo, as in training. (At f = 1 all tokens are equal, so that p has no effect; the curves end before.)

python tools/plot_objective.py [--out docs/objective.svg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch

from pmpo_megatron.algo.objective import PRESETS, ObjectiveOutput, evaluate_objective

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "objective"  # the same figure gives the same file
import matplotlib.pyplot as plt  # noqa: E402

TOKENS = 4096
STD = 0.15
STEPS = 129
CONFIG = PRESETS["pmpo"]
BOUND = CONFIG.eps_high_log
COLOURS = ("#3b6fb6", "#c2662d", "#3d8b57", "#8a5aa8")


def mixtures(sign: float) -> tuple[torch.Tensor, ObjectiveOutput]:
    """(log-ratios [STEPS, T], what the objective found) for one trajectory per clip fraction, from 0 to almost 1."""
    clipped_N = torch.linspace(0, TOKENS - 16, STEPS).round()
    rank_T = torch.arange(TOKENS, dtype=torch.float64)
    place_NT = (rank_T + 0.5 - clipped_N.unsqueeze(1)) / (TOKENS - clipped_N).unsqueeze(1)
    bell_NT = (STD * torch.special.ndtri(place_NT.clamp(min=1e-9))).clamp(-BOUND, BOUND)
    log_ratio_NT = sign * torch.where(rank_T < clipped_N.unsqueeze(1), 2 * BOUND, bell_NT)
    out = evaluate_objective(
        log_ratio_NT.flatten().requires_grad_(),
        torch.zeros(STEPS * TOKENS, dtype=torch.float64),
        torch.arange(STEPS).repeat_interleave(TOKENS),
        torch.full((STEPS,), sign),
        torch.full((STEPS,), 1 / STEPS),
        CONFIG,
    )
    return log_ratio_NT, out


def relative_weights(log_ratio_NT: torch.Tensor, out: ObjectiveOutput, log_ratio: float) -> torch.Tensor:
    """w[t] * T of a token at ``log_ratio``, for every trajectory: exp(p*x) over its mean."""
    power_NT = torch.exp(out.p_N.unsqueeze(1) * log_ratio_NT.clamp(max=BOUND))
    return torch.exp(out.p_N * log_ratio) / power_NT.mean(1)


def draw(path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    log_ratio_NT, up = mixtures(1.0)
    _, down = mixtures(-1.0)
    left.plot(up.clip_fraction_N, up.p_N, color=COLOURS[0], label="A > 0, clipped above")
    left.plot(down.clip_fraction_N, down.p_N, color=COLOURS[1], linestyle="--", label="A < 0, clipped below")
    left.set(xlabel="clip fraction f", ylabel="order p", title="p falls from 1 (GRPO) to 0 (GMPO)", ylim=(-0.03, 1.05))
    left.legend(frameon=False)
    for colour, log_ratio in zip(COLOURS, (BOUND, 0.2, 0.0, -0.2), strict=True):
        label = f"{log_ratio:+.1f}" + (" (clipped)" if log_ratio == BOUND else "")
        right.plot(up.clip_fraction_N, relative_weights(log_ratio_NT, up, log_ratio), color=colour, label=label)
    right.axhline(1.0, color="#888888", linewidth=0.8, linestyle=":")
    right.set(xlabel="clip fraction f", ylabel="weight w[t], times T", title="weight of a token by its log-ratio, A > 0")
    right.legend(frameon=False, title="log-ratio")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Title": "p and token weights against clip fraction"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/objective.svg"), help="the figure; default: docs/objective.svg")
    options = parser.parse_args()
    draw(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
