"""What a person sees: the numbers of the step, in a line or in a live table."""

import io
import logging
import sys

import pytest
from rich.console import Console

from pmpo_megatron.monitor.progress import (
    LineProgress,
    Pace,
    RichProgress,
    format_count,
    format_seconds,
    make_progress,
)

NUMBERS = {
    "reward/mean": 0.53125,
    "objective/p_mean": 0.824,
    "objective/p_q05": 0.31,
    "objective/p_q50": 0.9,
    "objective/p_q95": 1.0,
    "objective/ess_fraction": 0.912,
    "objective/ess_target": 0.95,
    "objective/clip_fraction": 0.031,
    "rollout/length_mean": 43.4,
    "policy/grad_norm": 0.5217,
    "mismatch/mean_abs": 1.3e-5,
    "throughput/tokens_per_s": 12345.0,
    "time/total_s": 12.3,
    "time/train_s": 4.25,
    "time/rollout_s": 7.0,
    "time/push_s": 0.001,
}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_line_shows_every_quantity_and_the_time_left(capsys):
    clock = Clock()
    progress = LineProgress(Pace(total_steps=10, first_step=2, clock=clock), "round")
    clock.now = 30.0
    progress.show(3, NUMBERS)
    line = capsys.readouterr().out
    assert line == (
        "round 3/10  reward 0.531  p 5/50/95% 0.31/0.90/1.00  ESS 0.9120  target 0.9500  clip 3.1%  len 43  |g| 0.522  "
        "mismatch 1.3e-05  tok/s 12.3k  time 12.3s  (rollout 7.0s, train 4.2s)  ETA 3m30s\n"
    )


def test_what_was_not_measured_is_left_out(capsys):
    LineProgress(Pace(total_steps=10, first_step=0), "round").show(0, {"eval/math_mean": 0.25})
    assert capsys.readouterr().out == "round 0/10  math 0.250\n"


def test_time_left_follows_the_recent_pace():
    clock = Clock()
    pace = Pace(total_steps=100, first_step=0, clock=clock)
    for step in range(1, 31):
        clock.now += 100.0 if step <= 20 else 1.0
        pace.advance(step)
    assert pace.seconds_left == pytest.approx(70.0)


def test_rich_table_shows_steps_and_lets_log_lines_through(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        progress = RichProgress(Pace(total_steps=10, first_step=0), "round", console)
        progress.show(1, NUMBERS)
        progress.show(1, {"eval/math_mean": 0.25})
        logging.getLogger("x").warning("something happened")
        progress.show(2, NUMBERS | {"reward/mean": 0.75})
        progress.close()
    finally:
        logging.getLogger().removeHandler(handler)
    shown = screen.getvalue()
    assert "something happened" in shown, "log lines go through the display"
    last = shown[shown.rfind("reward") :]
    assert "0.531" in last and "0.750" in last and "0.250" in last and "2/10" in last
    assert handler.stream is sys.stderr, "given back"


def test_auto_is_the_line_where_no_terminal_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(make_progress("auto", total_steps=1, step_name="round", first_step=0), LineProgress)


def test_formats():
    assert [format_seconds(s) for s in (4.21, 190, 7500, 273600)] == ["4.2s", "3m10s", "2h05m", "3d04h"]
    assert [format_count(c) for c in (870, 12_345, 4.5e6)] == ["870", "12.3k", "4.5M"]
