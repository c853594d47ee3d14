"""tools/show_rollouts.py: what a run saved, as a person sees it."""

import os
import subprocess
import sys
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
