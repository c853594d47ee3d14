"""Plots as SVG inside a page: colours become CSS variables, so that one picture serves light and dark mode.

matplotlib knows fixed colours only. It draws with stand-in colours that occur nowhere else, and the SVG text gets
``var(--ink)`` and the like in their place.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
NUM_SERIES = 8
SERIES = [f"#0a0c{index:02x}" for index in range(1, NUM_SERIES + 1)]
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card"} | {
    color: f"--series-{index}" for index, color in enumerate(SERIES, 1)
}
# Okabe-Ito order, told apart by colour-blind readers; lighter on dark ground.
LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b1468f", "#9a7d00", "#4f8fc0", "#6b5b95", "#555555"]
DARK = ["#56b4e9", "#f0894a", "#2fc99b", "#e08cc0", "#f0d060", "#8fc7f0", "#b8a6e0", "#b5b5b5"]

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text: selectable, and in the page's font
    "svg.hashsalt": "pmpo",  # equal data, equal file
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def color(index: int) -> str:
    """Stand-in colour of the ``index``-th series; the colours start over after `NUM_SERIES`."""
    return SERIES[index % NUM_SERIES]


@contextmanager
def figure(width: float = 6.2, height: float = 3.3) -> Iterator[tuple[Figure, Axes]]:
    """A matplotlib figure and axes [inches] in the page's style; closed afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(SETTINGS):
        drawn, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        try:
            yield drawn, axes
        finally:
            pyplot.close(drawn)


def to_svg(drawn: Figure, name: str) -> str:
    """``drawn`` as SVG text for inside a page. ``name`` keeps its ids apart from those of other pictures."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    text = re.sub(r'\b(id="|xlink:href="#|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1inherit-font", text)
    text = text.replace("inherit-font", "var(--font)")
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{name.replace("-", " ")}" ', text, count=1)


def css_variables(colors: list[str]) -> str:
    """CSS that gives the series their colours."""
    return " ".join(f"--series-{index}: {value};" for index, value in enumerate(colors, 1))
