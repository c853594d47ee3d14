"""Rewards: extraction, equality, hostile text, workers that hang or die, plug-ins, composition."""

import itertools
import json
import os
import pickle
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from pmpo_megatron.errors import ConfigError, PmpoError
from pmpo_megatron.rewards import RewardConfig, RewardPool, RewardScorer, equality
from pmpo_megatron.rewards.extraction import boxed_answers, extract_answer
from pmpo_megatron.rewards.pool import NOT_FINITE
from pmpo_megatron.rewards.process import Answer, checked
from tests.rollouts import rollout

CHILD_SLEEPS = "98.76543"  # seconds: a command line that no other process has
DATA = Path(os.environ.get("PMPO_DATA", Path(__file__).parents[4] / "shared/data"))


@pytest.fixture(scope="module")
def pool():
    with RewardPool("math", workers=2, timeout=30.0) as pool:
        yield pool


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{a }\{b\}}", r"\text{a }\{b\}"),
        (r"\boxed{x \boxed{3}}", r"x \boxed{3}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{5} or \boxed{unclosed", "5"),
        (r"\boxed{unclosed and then \boxed{6}", "6"),
        (r"\boxed{too long " + "x" * 2000 + r"\boxed{6} }", "6"),
        (r"\\boxed{7}", "7"),
        (r"} \{ \boxed{8}", "8"),
        ("3-5", "5"),
        ("it is -5", "-5"),
        ("a chance of .25", ".25"),
        ("it is 12, or rather 1,234.5.", "1,234.5"),
        ("no idea", None),
        ("", None),
    ],
)
def test_extraction(response, answer):
    assert extract_answer(response) == answer


def test_boxes_come_in_order():
    assert boxed_answers(r"\boxed{1}\fbox{2}\boxed{{3}}") == ["1", "2", "{3}"]


@pytest.mark.parametrize(
    "response, answer, score",
    [
        (r"\boxed{\frac12}", "0.5", 1),
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", 1),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1),
        (r"\boxed{(1, 2)}", r"(1,2)", 1),
        (r"\boxed{[0,1)}", r"(0,1]", 0),
        (r"\boxed{10,000}", "10000", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{\text{east}}", "east", 1),
        (r"\boxed{x+1}", "1+x", 1),
        (r"\boxed{3}", "4", 0),
        (r"\boxed{}", "", 0),
        (r"\boxed{4} but the answer 3 is elsewhere", "3", 0),
        (r"\boxed{3} no, \boxed{4}", "3", 0),
        ("42", "42", 1),
        ("", "42", 0),
        (r"\boxed{7}", ["6", "7"], 1),
        (r"\boxed{8}", ["6", "7"], 0),
        (r"\boxed{1 1/2}", "11/2", 0),
        (r"\boxed{1 1/2}", r"\frac32", 1),
        (r"\boxed{1 2}", "12", 0),
        (r"\boxed{10 000}", "10000", 1),
        (r"\boxed{(1,234)}", "(1234)", 0),
        (r"\boxed{(2,1)}", "1,2", 0),
        (r"\boxed{1,2}", "(1,2)", 1),
        (r"\boxed{2,1}", "1,2", 1),
        (r"\boxed{x=5}", "5", 1),
        (r"\boxed{5}", "x=5", 1),
        (r"\boxed{m+n=25}", "25", 1),
        (r"\boxed{\alpha=\frac{6}{4}}", "3/2", 1),
        (r"\boxed{2+2=4}", "4", 1),
        (r"\boxed{2+2=3}", "3", 0),
        (r"\boxed{5=3}", "3", 0),
        (r"\boxed{3 or 4}", "3", 0),
        (r"\boxed{101_2}", "101_3", 0),
        (r"\boxed{East}", "east", 1),
        (r"\boxed{\varnothing}", r"\emptyset", 1),
    ],
)
def test_scores(pool, response, answer, score):
    assert pool.score([response], [answer]) == [score]


def test_integers_are_compared_as_math_verify_would_without_its_cost(monkeypatch):
    written = ["5", "+5", "-5", "005", "-05", "0", "-0", "50", "1,234", "1234", "99999999999999999999", "100000000000000000000"]
    pairs = list(itertools.product(written, written))
    answers = [equality.same_answer(found, answer) for found, answer in pairs]
    monkeypatch.setattr(equality, "INTEGER", re.compile("nothing"))
    assert answers == [equality.same_answer(found, answer) for found, answer in pairs]
    monkeypatch.undo()
    assert not equality.same_answer("5", "1" * 5000), "Python reads no integer of so many digits"
    monkeypatch.setattr(equality, "_parse", None)  # which math-verify is asked through
    assert answers == [equality.same_answer(found, answer) for found, answer in pairs]


HOSTILE = [
    r"\boxed{" * 200_000,
    "{" * 3_000_000,
    r"\boxed{" + "{" * 2_000_000 + "}" * 2_000_000 + "}",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{9^{9^{9^{9^9}}}!}",
    r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "\\boxed{\x00}",
    "\ud800 \\boxed{\ud800}",
    r"\boxed{\frac{\frac{\sqrt[",
    r"\boxed{" + "1+" * 900 + "}",
    r"\boxed{\int_0^{10^{100}} x^{x^{x}} dx}",
]


def test_hostile_text_costs_at_most_its_time_out():
    with RewardPool("math", workers=2, timeout=5.0) as pool:
        pool.score(["1", "1"], ["1", "1"])
        scores = pool.score([*HOSTILE, r"\boxed{5}"], ["3"] * len(HOSTILE) + ["5"])
        assert scores == [0.0] * len(HOSTILE) + [1.0]
        assert pool.stats.scored == len(HOSTILE) + 3 and pool.stats.timeouts > 0, "some would have taken for ever"


def misbehave(response, answers):
    if response == "hang":
        while True:
            pass
    if response == "die":
        os._exit(3)
    if response == "raise":
        raise RuntimeError("no")
    if response == "print":
        print("noise on standard output")
    if response == "slow":
        time.sleep(2)
    if response == "fork":
        os.fork()
    if response == "read":
        return float(sys.stdin.read() == "")
    if response == "leave a child":
        subprocess.Popen(["sleep", CHILD_SLEEPS])
    return {"nan": float("nan"), "big": 7.0}.get(response, 0.5)


def test_hung_and_dead_workers_cost_their_item_alone_and_order_is_kept():
    with RewardPool(f"{__name__}:misbehave", workers=2, timeout=5.0) as pool:
        responses = ["a", "hang", "b", "die", "raise", "print", "nan", "big"] + ["c"] * 30 + ["die", "d"]
        expected = [0.5, 0, 0.5, 0, 0, 0.5, 0, 7.0] + [0.5] * 30 + [0, 0.5]
        assert pool.score(responses, ["x"] * len(responses)) == expected
        assert (pool.stats.timeouts, pool.stats.crashes, pool.stats.scored) == (1, 2, 40)
        assert pool.stats.errors == {"RuntimeError: no": 1, NOT_FINITE: 1}
        assert pool.score([], []) == []
        with pytest.raises(ValueError, match="2 responses but 1 answers"):
            pool.score(["a", "b"], ["x"])


def test_a_plug_in_that_forks_reads_or_leaves_children_disturbs_no_other_item():
    with RewardPool(f"{__name__}:misbehave", workers=1, timeout=5.0) as pool:
        responses = ["fork", "read", "fork", "read", "leave a child", "a"]
        assert pool.score(responses, ["x"] * 6) == [0.5, 1.0, 0.5, 1.0, 0.5, 0.5]
    assert CHILD_SLEEPS not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_workers_killed_or_stopped_between_calls():
    with RewardPool(f"{__name__}:misbehave", workers=2, timeout=5.0) as pool:
        pool.score(["a"] * 2, ["x"] * 2)
        for worker in pool._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.wait(10)
        assert pool.score(["a"] * 4, ["x"] * 4) == [0.5] * 4  # none had an item, so none costs one
        for worker in pool._workers:
            os.kill(worker.process.pid, signal.SIGSTOP)
        scores = pool.score(["a" * 5_000_000] * 2 + ["a"] * 2, ["x"] * 4)  # more than a pipe holds
        assert scores.count(0.5) >= 2 and scores[2:] == [0.5] * 2


def test_an_interrupted_call_leaves_nothing_to_the_next():
    with RewardPool(f"{__name__}:misbehave", workers=2, timeout=20.0) as pool:
        pool.score(["a"] * 2, ["x"] * 2)
        old = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyError("stop")))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyError):
                pool.score(["slow", "a"], ["x"] * 2)
        finally:
            signal.signal(signal.SIGALRM, old)
        assert pool.score(["big", "a", "big"], ["x"] * 3) == [7.0, 0.5, 7.0]


def test_threads_take_turns_and_a_closed_pool_says_so():
    results = {}
    with RewardPool(f"{__name__}:misbehave", workers=2) as pool:
        call = lambda text: results.__setitem__(text, pool.score([text] * 40, ["x"] * 40))  # noqa: E731
        threads = [threading.Thread(target=call, args=(text,)) for text in ("a", "big")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for answer in (3, None, [3]):
            with pytest.raises(TypeError, match="answer 0 is not text"):
                pool.score(["a"], [answer])
    assert results == {"a": [0.5] * 40, "big": [7.0] * 40}
    pool.close()
    with pytest.raises(PmpoError, match="closed"):
        pool.score(["a"], ["x"])


def test_a_hung_worker_does_not_outlive_a_killed_program():
    program = f"""from pmpo_megatron.rewards import RewardPool
pool = RewardPool("{__name__}:misbehave", workers=1, timeout=0.5)
pool.score(["a"], ["x"])
print(pool._workers[0].process.pid, flush=True)
pool.timeout = 99
pool.score(["hang"], ["x"])"""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=env) as main:
        worker = Path(f"/proc/{int(main.stdout.readline())}")
        time.sleep(1)  # it is in the hung function
        main.kill()
    deadline = time.monotonic() + 120
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not worker.exists()


def sends_a_pickle_bomb(response, answers):
    """Writes to the results' pipe what would make a file if it were unpickled, and goes on as if nothing had been."""
    if response.startswith("bomb"):
        bomb = pickle.dumps(Bomb(response.removeprefix("bomb")))
        for name in os.listdir("/proc/self/fd"):
            if os.path.exists(f"/proc/self/fd/{name}") and int(name) > 2 and stat.S_ISFIFO(os.fstat(int(name)).st_mode):
                with suppress(OSError):
                    os.write(int(name), struct.pack("<Q", len(bomb)) + bomb)
    return 0.5


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_worker_that_sends_a_pickle_is_replaced_and_nothing_is_executed(tmp_path):
    with RewardPool(f"{__name__}:sends_a_pickle_bomb", workers=1, timeout=5.0) as pool:
        assert pool.score(["a", f"bomb{tmp_path}/made", "a"], ["x"] * 3) == [0.5, 0.0, 0.5]
        assert pool.stats.crashes == 1
    assert not list(tmp_path.iterdir())
    pickle.loads(pickle.dumps(Bomb(f"{tmp_path}/made"))).close()
    assert list(tmp_path.iterdir())  # so it would have been seen


MESSAGES = ["3", '{"a": 1}', "[1, 2]", "[null]", "[true]", '"ready"', "[" * 100_000, "no JSON", "[[1, 2], 0.1, 0, 0]"]
MESSAGES += ["[[true], 0.1, 0, 0]", '[[0], "x", 0, 0]', "[[0], 0.1, 0.5, 0]", '[[["x"]], 0.1, 0, 0]', "[[null], 0.1, 0, 0]"]


@pytest.mark.parametrize("message", MESSAGES)
def test_only_scores_are_taken_from_a_busy_worker(message):
    with pytest.raises((ValueError, RecursionError)):
        checked(json.loads(message), 1, working=True)
    scores = [0.5, "an error", [1, 0.5]]
    assert checked([scores, 0.1, 1, 2], 3, working=True) == Answer(scores, 0.1, 1, 2)


def takes_one(response):
    return 1.0


def takes_four(response, answers, metadata, problem):
    return 1.0


def takes_names(response, *, answers):
    return 1.0


@pytest.mark.parametrize("name", ["takes_one", "takes_four", "takes_names"])
def test_a_function_of_another_signature_is_refused_before_anything_starts(name):
    with pytest.raises(ConfigError, match=rf"{name}' must be a function of \(response, answers\)"):
        RewardPool(f"{__name__}:{name}")


def test_a_time_out_beyond_what_timers_hold_is_refused():
    assert RewardConfig(timeout_s=86400.0).timeout_s == 86400.0
    with pytest.raises(ConfigError, match="timeout_s.*at most 86400"):
        RewardConfig(timeout_s=1e12)
    with pytest.raises(ConfigError, match="at most 86400"):
        RewardPool("math", timeout=1e12)


def test_unknown_functions_are_refused_before_anything_starts():
    for name in ("maths", "no.such.module:f", "json:nothing", "math:pi", "__main__:f", []):
        with pytest.raises(ConfigError, match="rewards.functions"):
            RewardPool(name)


def test_composition_and_overlong_penalty():
    config = RewardConfig(functions={"math": 1.0, "boxed": 0.5}, workers=1, overlong_penalty=1.0, overlong_tokens=10)
    scorer = RewardScorer(config, max_tokens=100)
    rollouts = [rollout(*r) for r in ((r"\boxed{4}", 20), ("4", 20), (r"\boxed{3}", 95), (r"\boxed{4}", 100))]
    groups = [SimpleNamespace(prompt=SimpleNamespace(answers=("4",), metadata={}, rewards=None), rollouts=rollouts)]
    correct = (True, True, False, True)  # by the first function, whatever format and length make of the reward
    assert scorer.score(groups) == [((1.5, 1.0, 0.0, 0.5), correct)]
    scorer.close()


FILES = [
    *(f"eval/{name}" for name in ("aime24", "amc23", "math500", "minerva", "olympiadbench", "gsm8k")),
    *(f"train/{name}" for name in ("gsm8k", "asdiv")),
]


@pytest.mark.skipif(not (DATA / "eval").is_dir(), reason=f"no data in {DATA}; set PMPO_DATA")
@pytest.mark.parametrize("name", FILES)
def test_own_answers_are_accepted_and_others_are_not(pool, name):
    answers = [json.loads(line)["answer"] for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]
    solution = lambda answer: rf"\boxed{{{answer if isinstance(answer, str) else ', '.join(answer)}}}"  # noqa: E731
    own = pool.score([solution(a) for a in answers], answers)
    assert [a for a, score in zip(answers, own, strict=True) if not score] == []
    shifted = answers[7:] + answers[:7]
    pairs = [(a, b) for a, b in zip(shifted, answers, strict=True) if values(a) != values(b)]
    wrong = [
        p for p, score in zip(pairs, pool.score([solution(a) for a, _ in pairs], [b for _, b in pairs]), strict=True) if score
    ]
    assert not wrong


def values(answer):
    """What tells answers apart: numbers as numbers, other texts without spaces."""
    texts = [answer] if isinstance(answer, str) else answer
    return sorted(re.sub(r"^(-?[\d,]+)\.?0*$", lambda m: m[1].replace(",", ""), text.replace(" ", "")) for text in texts)
