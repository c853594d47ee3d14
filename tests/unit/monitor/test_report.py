"""The report: one file that needs nothing else, shows what was logged, and refuses what is no run."""

import html.parser
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from pmpo_megatron.errors import DataError
from pmpo_megatron.monitor import Distribution, MonitorConfig, RunLog, plots, write_report
from pmpo_megatron.monitor.plots import moving_mean
from pmpo_megatron.monitor.read import read_run

ROOT = Path(__file__).parents[3]
QUIET = MonitorConfig(progress="off", tensorboard=False)


def make_run(directory, *, preset="pmpo", steps=5):
    generator = np.random.default_rng(0)
    log = RunLog(QUIET, directory, run={"objective": {"preset": preset}, "run": {"rounds": steps}}, total_steps=steps)
    log.log(0, {"eval/arithmetic_mean": 0.35, "eval/arithmetic_length_mean": 9.0})
    for step in range(1, steps + 1):
        p, clip = generator.random(8), generator.random(8) / 4
        log.log(
            step,
            {
                "reward/mean": step / steps,
                "objective/p": Distribution(p),
                "mismatch/max_abs": float("nan") if step == 2 else 1e-4,
                "policy/grad_norm": 0.5,
                "time/train_s": 3.0,
                "time/push_to_engine_s": 0.5,
                "time/total_s": 4.0,
            },
            trajectories={"p": p, "ess": (1 - clip) * 8, "clip_fraction": clip, "length": [8] * 8},
            rollouts=[{"prompt": "is 1 < 2 & 3?", "response": "<script>alert(1)</script>", "reward": 1.0}],
        )
    log.log(steps, {"eval/arithmetic_mean": 0.95, "eval/arithmetic_length_mean": 9.0})
    log.close()
    return directory


class Page(html.parser.HTMLParser):
    """Collects tags and what would be loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.tags, self.outside = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.outside.append(value)


def parse(path):
    page = Page()
    page.feed(path.read_text())
    return page


def test_one_run(tmp_path):
    out = write_report([make_run(tmp_path / "first")], tmp_path / "out" / "report.html")
    text, page = out.read_text(), parse(out)
    assert not page.outside and "url(http" not in text and "@import" not in text and "script" not in page.tags
    assert "&lt;script&gt;alert(1)" in text, "responses are shown as text"
    assert "0.350 → 0.950" in text and "held-out arithmetic" in text and "5 of 5" in text
    assert "arithmetic_length" not in text, "a length is no accuracy"
    for title in ("Mean reward", "p over trajectories", "Share of trajectories", "ESS against clip fraction", "Time per phase"):
        assert title in text
    assert "push to engine" in text and "Entropy" not in text, "what was not measured has no empty plot"
    assert "prefers-color-scheme: dark" in text and "var(--series-1)" in text
    assert "#0a0b0" not in text and "#0a0c0" not in text, "stand-in colours are all replaced"


def test_effective_sample_size_is_drawn_as_a_share_of_the_tokens(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_finish", lambda _, axes, *rest, **names: drawn.append(axes.lines[0].get_xydata().copy()))
    plots.ess_against_clipping([read_run(make_run(tmp_path / "first"))])
    np.testing.assert_allclose(drawn[0][:, 1], 1 - drawn[0][:, 0], rtol=1e-3)


def test_what_is_measured_by_source_is_drawn_a_line_for_each(tmp_path, monkeypatch):
    for name, sources in (("mixed", ("sums", "code")), ("other", ("sums",))):
        log = RunLog(QUIET, tmp_path / name, run={}, total_steps=2)
        for step in (1, 2):
            values = {f"source/{source}/p_mean": step + place for place, source in enumerate(sources)}
            values |= {f"eval/{source}/accuracy_mean": step / 2 - 0.25 for source in sources}
            log.log(step, values | {f"source/{source}/ess_fraction": 0.5 for source in sources})
        log.close()
    text = write_report([tmp_path / "mixed"], tmp_path / "r.html").read_text()
    table = text[text.index("<h2>Sources</h2>") :]
    assert "<td>mixed</td><td>code</td><td>0.250 → 0.750</td>" in table and "<td>3.000</td><td>0.500</td><td>-</td>" in table
    assert "<h2>Sources</h2>" not in write_report([make_run(tmp_path / "single")], tmp_path / "s.html").read_text()
    drawn = []
    monkeypatch.setattr(plots, "to_svg", lambda figure, name: drawn.append(figure.axes[0].lines))
    mixed, other = (read_run(tmp_path / name) for name in ("mixed", "other"))
    draw = plots.by_source("p_mean", "p", "p")
    draw([mixed])
    draw([mixed, other])
    lines = [{line.get_label(): line.get_ydata().tolist() for line in each} for each in drawn]
    assert lines[0] == {"sums": [1.0, 2.0], "code": [2.0, 3.0]}
    assert set(lines[1]) == {"mixed: sums", "mixed: code", "other: sums"}
    assert plots.by_source("clip_fraction", "clip", "clip")([mixed]) is None, "nothing was measured"
    plots.by_source("accuracy_mean", "accuracy", "accuracy", section="eval")([other])
    assert [line.get_ydata().tolist() for line in drawn[2]] == [[0.25, 0.75]] and not plots.held_out(mixed)


def test_every_picture_is_well_formed_and_ids_do_not_clash(tmp_path):
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", preset="grpo")]
    text = write_report(runs, tmp_path / "r.html").read_text()
    pictures = re.findall(r"<svg .*?</svg>", text, flags=re.S)
    assert len(pictures) >= 6
    ids = []
    for picture in pictures:
        for element in ElementTree.fromstring(picture).iter():
            ids += [element.get("id")] if element.get("id") else []
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids), "every clip path is there"
    assert set(re.findall(r'xlink:href="#([^"]*)"', text)) <= set(ids)


def test_several_runs_are_overlaid_and_what_differs_is_shown(tmp_path):
    runs = [make_run(tmp_path / name / "run", preset=name) for name in ("pmpo", "grpo")]
    text = write_report(runs, tmp_path / "r.html", title="Presets").read_text()
    assert "<title>Presets</title>" in text
    assert "pmpo/run: training" in text and "grpo/run: training" in text, "equal names are told apart"
    differing = text[text.index("What differs") : text.index("All ")]
    assert "objective.preset" in differing and "run.rounds" not in differing


def test_a_run_of_one_step_and_without_extras(tmp_path):
    log = RunLog(QUIET, tmp_path, run={}, total_steps=3)
    log.log(1, {"reward/mean": 0.5, "time/train_s": 1.0})
    log.close()
    text = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "Time per phase" in text and "1 of 3" in text


@pytest.mark.parametrize("count", [1, 2, 7, 40, 100])
def test_moving_mean(count):
    values = np.random.default_rng(count).random(count)
    values[count // 2] = np.nan
    half = max(1, round(count * 0.05)) // 2
    wanted = [
        np.mean(window[np.isfinite(window)]) if np.isfinite(window).any() else np.nan
        for window in (values[max(0, i - half) : i + half + 1] for i in range(count))
    ]
    np.testing.assert_allclose(moving_mean(values), wanted, rtol=1e-12)


def test_what_is_no_run_says_so(tmp_path):
    make_run(tmp_path / "runs" / "a", steps=1)
    with pytest.raises(DataError, match="runs is not a run: it has no metrics.jsonl; did you mean .*runs/a?"):
        read_run(tmp_path / "runs")
    with pytest.raises(DataError, match="nothing does not exist"):
        read_run(tmp_path / "nothing")
    with pytest.raises(DataError, match="is a file; give the run's directory"):
        read_run(tmp_path / "runs" / "a" / "metrics.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(DataError, match="has not finished a step"):
        read_run(tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(DataError, match="metrics.jsonl:1: has no whole number 'step'"):
        read_run(tmp_path / "empty")


def test_command_line(tmp_path):
    run = make_run(tmp_path / "first", steps=2)
    command = [sys.executable, str(ROOT / "tools/plot_run.py")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == f"report: {(run / 'report.html').as_uri()}"
    failed = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
