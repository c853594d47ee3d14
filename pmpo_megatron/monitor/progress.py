"""What a person sees while a run goes on: a live table on a terminal, one line for every step elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Numbers = Mapping[str, float]


class ProgressDisplay(Protocol):
    """Shows the numbers of each finished step."""

    def show(self, step: int, numbers: Numbers) -> None: ...

    def close(self) -> None: ...


def make_progress(kind: str, *, total_steps: int, step_name: str, first_step: int) -> ProgressDisplay:
    """The display ``kind`` (auto, rich, line, off); auto is rich on a terminal and line elsewhere."""
    if kind == "off":
        return NoProgress()
    pace = Pace(total_steps=total_steps, first_step=first_step)
    if kind == "rich" or (kind == "auto" and sys.stdout.isatty()):
        return RichProgress(pace, step_name)
    return LineProgress(pace, step_name)


class Pace:
    """Seconds per step over the last steps, and how long the rest will take."""

    def __init__(self, *, total_steps: int, first_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps, self._clock = total_steps, clock
        self._marks: deque[tuple[int, float]] = deque([(first_step, clock())], maxlen=11)

    def advance(self, step: int) -> None:
        self._marks.append((step, self._clock()))

    @property
    def seconds_left(self) -> float | None:
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        if last <= first:
            return None
        return (ended - began) / (last - first) * max(0, self.total_steps - last)


class NoProgress:
    """Shows nothing."""

    def show(self, step: int, numbers: Numbers) -> None:
        pass

    def close(self) -> None:
        pass


class LineProgress:
    """One plain line for every step: readable in a log file."""

    def __init__(self, pace: Pace, step_name: str) -> None:
        self._pace, self._step_name = pace, step_name

    def show(self, step: int, numbers: Numbers) -> None:
        self._pace.advance(step)
        parts = [f"{self._step_name} {step}/{self._pace.total_steps}"]
        parts += [f"{label} {text}" for label, text in step_cells(numbers)]
        if phases := phase_cells(numbers):
            parts.append("(" + ", ".join(f"{name} {text}" for name, text in phases) + ")")
        if self._pace.seconds_left is not None:
            parts.append(f"ETA {format_seconds(self._pace.seconds_left)}")
        print("  ".join(parts), flush=True)

    def close(self) -> None:
        pass


class RichProgress:
    """A live table of the last steps with a bar under it; log lines scroll above it."""

    ROWS = 12

    def __init__(self, pace: Pace, step_name: str, console: Console | None = None) -> None:
        self._pace, self._step_name, self._step = pace, step_name, 0
        self._rows: deque[dict[str, str]] = deque(maxlen=self.ROWS)
        self._phases: list[tuple[str, str]] = []
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2, vertical_overflow="visible")
        before = {sys.stderr, sys.stdout}
        self._live.start()
        self._handlers = _redirect_log_handlers(before)

    def show(self, step: int, numbers: Numbers) -> None:
        self._pace.advance(step)
        self._step = step
        row = {self._step_name: str(step)} | dict(step_cells(numbers))
        if self._rows and self._rows[-1][self._step_name] == str(step):  # an evaluation after the step
            row = self._rows.pop() | row
        self._rows.append(row)
        self._phases = phase_cells(numbers) or self._phases
        self._live.refresh()

    def close(self) -> None:
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._live.stop()

    def _render(self) -> Group:
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        table = Table(
            *columns, box=None, pad_edge=False, header_style="bold", row_styles=["dim"] * (len(self._rows) - 1) + [""]
        )
        for row in self._rows:
            table.add_row(*(row.get(name, "") for name in columns))
        left = self._pace.seconds_left
        status = f" {self._step}/{self._pace.total_steps}"
        status += f"  ETA {format_seconds(left)}" if left is not None else "  first step is running"
        status += "".join(f"  {name} {text}" for name, text in self._phases)
        return Group(table, ProgressBar(total=max(1, self._pace.total_steps), completed=self._step, width=40), Text(status))


def _redirect_log_handlers(before: set[object]) -> list[tuple[logging.StreamHandler, object]]:
    """Log handlers hold the stream of their birth; let them write through the live display, which keeps its place."""
    moved = []
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in before:
            moved.append((handler, handler.setStream(sys.stderr)))
    return [(handler, stream) for handler, stream in moved if stream is not None]


def step_cells(numbers: Numbers) -> list[tuple[str, str]]:
    """(label, text) of the numbers that tell how a step went; those that were not measured are left out."""

    def cell(label: str, name: str, form: Callable[[float], str]) -> None:
        if name in numbers:
            cells.append((label, form(numbers[name])))

    cells: list[tuple[str, str]] = []
    cell("reward", "reward/mean", "{:.3f}".format)
    cell("held-out", "eval/accuracy_mean", "{:.3f}".format)
    for name in sorted(numbers):
        if name.startswith("eval/") and name.endswith("_mean") and name != "eval/accuracy_mean":
            cell(name[5:-5], name, "{:.3f}".format)
    if "objective/p_q05" in numbers:
        cells.append(("p 5/50/95%", "/".join(f"{numbers[f'objective/p_{q}']:.2f}" for q in ("q05", "q50", "q95"))))
    cell("ESS", "objective/ess_fraction", "{:.4f}".format)
    cell("target", "objective/ess_target", "{:.4f}".format)
    cell("clip", "objective/clip_fraction", "{:.1%}".format)
    cell("len", "rollout/length_mean", "{:.0f}".format)
    cell("|g|", "policy/grad_norm", "{:.3g}".format)
    cell("mismatch", "mismatch/mean_abs", "{:.1e}".format)
    cell("tok/s", "throughput/tokens_per_s", format_count)
    cell("time", "time/total_s", format_seconds)
    return cells


def phase_cells(numbers: Numbers) -> list[tuple[str, str]]:
    """(phase, text) of every phase of the step, longest first."""
    phases = [(name[5:-2], value) for name, value in numbers.items() if name.startswith("time/") and name.endswith("_s")]
    phases = sorted((phase for phase in phases if phase[0] != "total"), key=lambda phase: -phase[1])
    return [(name, format_seconds(value)) for name, value in phases if value >= 0.05]


def format_seconds(seconds: float) -> str:
    """``4.2s``, ``3m10s``, ``2h05m``, ``3d04h``."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if not hours:
        return f"{minutes}m{int(seconds % 60):02d}s"
    return f"{days}d{hours % 24:02d}h" if days else f"{hours}h{minutes % 60:02d}m"


def format_count(value: float) -> str:
    """``870``, ``12.3k``, ``4.5M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def show_progress(label: str, total: int, items: Iterable) -> Iterable:
    """A bar on a terminal; two lines where the output is a file."""
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{label} ...", file=sys.stderr, flush=True)
        return items
    return track(items, label, total=total, console=console)
