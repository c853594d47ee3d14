"""Rewards of one's own for groups, and asynchronous ones: a judge asked over HTTP on this machine. What each costs."""

import asyncio
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards import RewardConfig, RewardPool, RewardScorer
from pmpo_megatron.rewards.calls import time_limit
from pmpo_megatron.rewards.pool import NOT_FINITE, Request
from tests.rollouts import rollout

JUDGE = Path(__file__).parents[3] / "examples/judge"


def shorter_than_mean(responses, answers, metadata):
    """How much shorter each is than the mean of its group, by the row's weight; the misbehaviours are asked for."""
    if "hang" in responses:
        time.sleep(1000)
    if "too few" in responses:
        return [1.0]
    if "one" in responses:
        return 1.0
    if "nan" in responses:
        return [float("nan"), 2.0]
    assert answers == ["x", "y"]
    mean = sum(map(len, responses)) / len(responses)
    return [metadata["weight"] * (mean - len(response)) for response in responses]


def length(response, answers):
    return float(len(response))


def test_a_group_function_sees_its_group_alone_and_what_it_returns_is_checked():
    group, single = f"{__name__}:shorter_than_mean", f"{__name__}:length"
    texts = [["a", "aaa"], ["a"], ["hang", "b"], ["too few", "b"], ["one", "b"], ["nan", "b"], ["cc", "c", "cccc", "c"]]
    with RewardPool([group, single], workers=2, timeout=5.0) as pool:
        requests = [Request(responses, ["x", "y"], {"weight": 2.0}) for responses in texts]
        scores = pool.score_requests([*requests, Request(["dddd"], "x", functions=[single])])
    expected = [[2.0, -2.0], [0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 2.0, -4.0, 2.0]]
    assert [each[group] for each in scores[:-1]] == expected
    assert [each[single] for each in scores] == [*([len(text) for text in row] for row in texts), [4.0]]
    assert list(scores[-1]) == [single], "a request names the functions that score it"
    stats = pool.stats.functions[group]
    assert (stats.calls, stats.timeouts, stats.crashes, stats.seconds >= 5.0) == (7, 1, 0, True)
    assert stats.errors == {"1 scores for 2 responses": 2, NOT_FINITE: 1}
    assert (pool.stats.functions[single].calls, pool.stats.functions[single].timeouts) == (16, 0)


def test_the_scorer_adds_group_rewards_to_others_and_logs_what_each_cost(caplog):
    group, single = f"{__name__}:shorter_than_mean", f"{__name__}:length"
    scorer = RewardScorer(RewardConfig(functions={single: 1.0, group: 0.5}, workers=1), max_tokens=9)
    prompt = SimpleNamespace(answers=("x", "y"), metadata={"weight": 1.0}, rewards=None)
    groups = [
        SimpleNamespace(prompt=prompt, rollouts=[rollout(text) for text in texts]) for texts in (("a", "aaa"), ("bb", "bb"))
    ]
    assert [rewards for rewards, _ in scorer.score(groups)] == [(1.5, 2.5), (2.0, 2.0)]
    metrics = scorer.pool.stats.metrics()
    assert metrics[f"rewards/{group}/seconds"] > 0 and metrics[f"rewards/{group}/timeouts"] == 0
    with caplog.at_level("INFO"):
        scorer.close()
    assert f"reward {single}: " in caplog.text and "in 4 calls" in caplog.text and "in 2 calls" in caplog.text


class Server:
    """An OpenAI-compatible server in a thread, whose grade is the number in the response.

    "never" gets no reply; "once" fails the first time, and "always" every time; the first ``wanted`` calls wait for each other.
    """

    def __init__(self, wanted):
        self.wanted, self.under_way, self.most, self.bodies = wanted, 0, 0, []
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(ready,))
        self.thread.start()
        ready.wait()

    def _run(self, ready):
        async def serve():
            self.together, self.done = asyncio.Event(), asyncio.Event()
            application = web.Application()
            application.router.add_post("/v1/chat/completions", self._reply)
            runner = web.AppRunner(application, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            ready.set()
            await self.done.wait()
            await runner.cleanup()

        self.loop.run_until_complete(serve())

    async def _reply(self, request):
        body = await request.json()
        text = body["messages"][0]["content"].partition("<response>\n")[2].partition("\n</response>")[0]
        seen = [each for each, _ in self.bodies].count(text)
        self.bodies.append((text, body))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if self.under_way >= self.wanted:
                self.together.set()
            await self.together.wait()
            if text == "never":
                await asyncio.sleep(1000)
            if text == "always" or (text == "once" and not seen):
                return web.Response(status=503)
            grade = text if text.isdigit() else "7" if text == "once" else "as you like"
            return web.json_response({"choices": [{"message": {"content": grade}}]})
        finally:
            self.under_way -= 1

    def close(self):
        self.loop.call_soon_threadsafe(self.done.set)
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    server = Server(wanted=3)
    monkeypatch.setenv("JUDGE_URL", server.url)
    monkeypatch.setenv("JUDGE_MODEL", "a-judge")
    monkeypatch.setattr(sys, "path", [*sys.path, str(JUDGE)])
    yield server
    server.close()


def test_a_judge_over_http_is_asked_with_limits_of_concurrency_and_time_retried_and_counted(server):
    texts = ["3", "once", "never", "always", "chatter", "10", "0", "4", "5", "6"]
    with RewardPool("judge:judge", workers=2, timeout=5.0, concurrency=3, attempts=2) as pool:
        scores = pool.score(texts, ["42"] * 10, [{"question": "6*7"}] * 10)
        stats = pool.stats.functions["judge:judge"]
        assert scores == [0.3, 0.7, 0.0, 0.0, 0.0, 1.0, 0.0, 0.4, 0.5, 0.6]
        assert (stats.calls, stats.retries, stats.timeouts, stats.crashes) == (10, 4, 1, 0)
        assert sorted(text.partition(":")[0] for text in stats.errors) == ["ClientResponseError", "ValueError"]
        assert pool.score(["8"], ["42"]) == [0.8], "the same worker, or another, goes on"
    asked = [text for text, _ in server.bodies]
    assert [asked.count(text) for text in texts] == [1, 2, 2, 2, 2, 1, 1, 1, 1, 1]
    assert server.most == 3
    content = server.bodies[0][1]["messages"][0]["content"]
    assert server.bodies[0][1]["model"] == "a-judge" and "6*7" in content and "42" in content


async def blocks(responses, answers):
    if responses[0] == "block":
        time.sleep(1000)
    return [float(len(response)) for response in responses]


def test_an_asynchronous_function_that_blocks_is_ended_and_one_for_groups_is_awaited():
    name = f"{__name__}:blocks"
    with RewardPool(name, workers=1, timeout=1.0, concurrency=9, attempts=1) as pool:
        assert pool.score_requests([Request(["block", "b"], "x")]) == [{name: [0.0, 0.0]}]
        assert pool.stats.timeouts == 1
        assert pool.score_requests([Request(["a", "bb"], "x"), Request(["ccc"], "x")]) == [{name: [1.0, 2.0]}, {name: [3.0]}]


@pytest.mark.parametrize("calls, concurrency, attempts", [(1, 1, 1), (10, 3, 2), (100, 32, 3), (7, 64, 4)])
def test_the_limit_of_a_job_leaves_room_for_every_attempt(calls, concurrency, attempts):
    one_after_another = -(-calls // concurrency) * attempts * 5.0
    assert one_after_another <= time_limit(calls, 5.0, concurrency, attempts) <= 2 * one_after_another + 15.0


def test_numbers_out_of_range_are_refused():
    for bad in ({"concurrency": 0}, {"attempts": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            RewardPool("math", **bad)
