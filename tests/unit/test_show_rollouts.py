"""tools/show_rollouts.py: what a run saved, as a person sees it."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from pmpo_megatron.monitor import MonitorConfig, RunLog

ROOT = Path(__file__).parents[2]


def show(*arguments):
    command = [sys.executable, "tools/show_rollouts.py", *map(str, arguments)]
    environment = dict(os.environ, COLUMNS="100")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A record of three rounds of two responses, whose rewards are 0.1, 0.2, ... 0.6 in the order 1, 6, 2, 5, 3, 4."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    log = RunLog(MonitorConfig(progress="off", tensorboard=False), directory, run={}, total_steps=3)
    for step, numbers in ((1, (1, 6)), (2, (2, 5)), (3, (3, 4))):
        rollouts = [
            {
                "prompt": f"{n}+[b]1[/b]=",
                "response": f"answer{n}\nsecond line",
                "reward": n / 10,
                "answers": [str(n + 1), "x"],
                "tokens": 7,
            }
            for n in numbers
        ]
        log.log(step, {"reward/mean": 0.5}, rollouts=rollouts)
    log.close()
    return directory


def responses(text):
    return [int(line.removeprefix("answer")) for line in text.splitlines() if line.startswith("answer")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [3, 4]),
        (("--round", 1), [1, 6]),
        (("--round", 2, "--best"), [5, 2]),
        (("--worst",), [1, 2, 3, 4]),
        (("--best", "--count", 2), [6, 5]),
    ],
)
def test_the_responses_that_were_asked_for_in_their_order(run, options, expected):
    found = show(run, *options)
    assert found.returncode == 0, found.stderr
    assert responses(found.stdout) == expected


def test_everything_that_was_saved_of_a_response_is_there_as_it_was(run):
    text = show(run, "--round", 1, "--count", 1).stdout
    assert "round 1, reward 0.1, tokens 7" in text
    assert "1+[b]1[/b]=" in text, "not taken for markup"
    assert "answer1\nsecond line\naccepted: 2 | x" in text


def test_what_cannot_be_shown_is_said(run, tmp_path):
    empty = tmp_path / "empty"
    RunLog(MonitorConfig(progress="off", tensorboard=False), empty, run={}, total_steps=3).close()
    cases = {
        "is not a directory": (tmp_path / "gone",),
        "it has no rollouts.jsonl": (tmp_path,),
        "no round is finished yet, or monitor.rollout_samples is 0": (empty,),
        "no responses of round 9 are saved; there are rounds 1 to 3": (run, "--round", 9),
    }
    for message, arguments in cases.items():
        found = show(*arguments)
        assert found.returncode == 2 and message in found.stderr and "Traceback" not in found.stderr


def test_a_response_cannot_command_the_terminal(tmp_path):
    """Colours, a title, a cleared screen, a bell, the eight-bit form, text that runs backwards: shown, not obeyed."""
    log = RunLog(MonitorConfig(progress="off", tensorboard=False), tmp_path, run={}, total_steps=1)
    evil = "\x1b]0;title\x07 \x1b[2J \x9b31m \u202ereversed \r gone \x7f"
    log.log(1, {"a": 1.0}, rollouts=[{"prompt": evil, "response": evil, "reward": 1.0, "answers": [evil], "note": evil}])
    log.close()
    text = subprocess.run(
        [sys.executable, "tools/show_rollouts.py", str(tmp_path)], cwd=ROOT, capture_output=True, timeout=60
    ).stdout.decode()
    assert not {c for c in text if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}
    assert text.count("\\x1b]0;title\\x07 \\x1b[2J \\x9b31m \\u202ereversed \\r") == 4
