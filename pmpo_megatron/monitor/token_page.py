"""A page of trajectories whose tokens are shaded by their share of the gradient: what p does, token by token. Works offline."""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pmpo_megatron.checkpoint.files import replace_text
from pmpo_megatron.monitor.page import page
from pmpo_megatron.monitor.read import RunRecord

MAX_ROUNDS = 12  # shown, spread over the run, the last one among them
FULL_SHADE = 3.0  # of w[t] * T: three times an even share, or more
STYLE = """<style>
.tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 }
.tokens span { border-radius: 3px; padding: .1em 0 }
.tokens .clipped { outline: 1px solid var(--series-2); color: var(--series-2); text-decoration: line-through }
.up { --tint: var(--series-3) } .down { --tint: var(--series-4) }
</style>"""
LEGEND = (
    "Each token is shaded by w[t] * T, its share of the trajectory's gradient times the number of tokens: no shade is no "
    f"gradient, full shade {FULL_SHADE:g} times an even share or more. Green trajectories are made more likely (advantage "
    "above 0), the others less. Struck-through tokens are clipped: they have no gradient. Point at a token for its numbers. "
    "p = 1 weights tokens by their ratios, p = 0 evenly."
)


def write_token_page(run: RunRecord, out: Path) -> Path | None:
    """Writes the page about ``run`` to ``out``, replacing it in one step; None where the run recorded no tokens."""
    if not run.tokens:
        return None
    replace_text(out, render_tokens(run))
    return out


def render_tokens(run: RunRecord) -> str:
    """The page as text."""
    rounds = [(step, list(records)) for step, records in groupby(run.tokens, key=lambda record: record["step"])]
    chosen = sorted({round(position) for position in np.linspace(0, len(rounds) - 1, min(MAX_ROUNDS, len(rounds)))})
    body = [STYLE, f'<p class="note">{escape(LEGEND)}</p>']
    for step, records in (rounds[index] for index in chosen):
        body.append(f"<h2>{escape(run.step_name)} {step}, last optimizer step</h2>")
        body += [_trajectory(record) for record in records]
    written = time.strftime("%Y-%m-%d %H:%M")
    subtitle = f"Power-mean policy optimization. Written {written}."
    return page(f"{run.label}: which tokens carry the gradient", subtitle, "\n".join(body))


def _trajectory(record: Mapping[str, Any]) -> str:
    length, advantage = len(record["tokens"]), record["advantage"]
    target, largest = record["target_ess"] / length, max(record["weight"])
    numbers = (
        f"p {record['p']:.3f}, ESS {record['ess'] / length:.3f} of {length} tokens, target {target:.3f}, "
        f"{record['clip_fraction']:.1%} clipped, largest w[t] * T {largest:.2f}, "
        f"advantage {advantage:+.2f}, reward {record['reward']:g}"
    )
    columns = (record["tokens"], record["weight"], record["log_ratio"])
    spans = "".join(_token(*values) for values in zip(*columns, strict=True))
    return (
        f'<div class="card {"up" if advantage > 0 else "down"}"><b>{escape(numbers)}</b>'
        f'<div class="tokens"><span class="label">{escape(record["prompt"])}</span>{spans}</div></div>'
    )


def _token(text: str, weight: float, log_ratio: float) -> str:
    hint = f"w*T {weight:.2f}, log-ratio {log_ratio:+.3f}"
    if weight == 0:
        return f'<span class="clipped" title="{hint}, clipped">{escape(text)}</span>'
    shade = 100 * min(1.0, weight / FULL_SHADE)
    return (
        f'<span style="background: color-mix(in srgb, var(--tint) {shade:.0f}%, transparent)" '
        f'title="{hint}">{escape(text)}</span>'
    )
