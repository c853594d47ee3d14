"""A rank that dies, stalls or stays away ends the others within seconds, and their message names it."""

import os
import re
import subprocess
import sys
import time

import pytest

from tests.distributed.harness import ROOT, free_port

RANKS = 3
BAD = 1


def play(scenario, *, limit_s=240.0):
    """(exit code, output) of every rank but the bad one, which is killed in the end."""
    environment = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(RANKS))
    environment |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo", PYTHONWARNINGS="ignore")
    command = [sys.executable, "-m", "tests.distributed.liveness_worker", scenario]
    environments = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ranks = [subprocess.Popen(command, cwd=ROOT, env=one, **output) for one in environments]
    deadline, outputs = time.monotonic() + limit_s, []
    try:
        for rank, process in enumerate(ranks):
            if rank != BAD:
                text, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
                outputs.append((process.returncode, text))
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return outputs


@pytest.mark.parametrize(
    "scenario, message",
    [
        ("killed", r"in the first sum: rank 1 \(process \d+ on .*\) gives no sign of life"),
        ("stopped", r"in the second sum: rank 1 \(process \d+ on .*\) gave no sign of life for 12 s"),
        ("raises", r"rank 1 \(.*\) failed: ValueError: a reward is missing"),
        ("elsewhere", r"rank 1 \(process .* last seen in counting sheep\) is alive but did not come"),
        ("source_dies", r"waited for rank 1 \(process .*\): no sign of life any more"),
        ("source_late", r"waited 1.5 s for rank 1 \(process .*\), which did not come"),
    ],
)
def test_the_others_end_and_name_it(scenario, message):
    outputs = play(scenario)
    assert all(code not in (0, None) for code, _ in outputs), outputs
    texts = [text for _, text in outputs]
    assert all("RankFailure" in text for text in texts), texts
    assert any(re.search(message, text) for text in texts), texts
    assert all("rank 1 (" in text for text in texts), texts


def test_a_slow_source_that_lives_is_waited_for():
    assert [(code, "RECEIVED" in text) for code, text in play("slow_source")] == [(0, True), (0, True)]


def test_errors_of_computation_pass_unchanged():
    for code, text in play("ordinary_error"):
        assert code == 1 and "RankFailure" not in text and "RuntimeError" in text
