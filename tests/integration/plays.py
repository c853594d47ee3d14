"""Episodes that the tests of tests/integration/test_episodes.py name, as a user's file would hold them."""

import asyncio
import contextlib
import os
import random
import sys
import time
from functools import partial

from aiohttp import ClientSession
from openai import APIStatusError, AsyncOpenAI, AuthenticationError

from pmpo_megatron.rollout.policy import Outcome

kept: dict = {}  # what an episode leaves for its test


async def once(prompt, policy):
    return float(len(await policy.sample()))


async def three_turns(prompt, policy):
    """Sampled, told, sampled, told, sampled; the prompt's answer says how many told tokens."""
    for told in ("0123456789" * 4, [7, 8, 9]):
        await policy.sample(max_tokens=9)
        kept.pop("between turns", lambda: None)()
        policy.tell(told)
    return len(await policy.sample(max_tokens=9))


async def unsteady(prompt, policy):
    """Turns of unequal length and number, which depend on what was sampled, after pauses that depend on the clock."""
    said = ""
    while len(said) < 30 and policy.room > 14:
        said += await policy.sample(stop=["7", "a", "="], max_tokens=11) or "."
        kept.pop("between turns", lambda: None)()
        await asyncio.sleep(random.uniform(0, 0.05))  # noqa: S311  no secret
        policy.tell(f"<{len(said) % 10}>")
    return float(len(said))


async def failing(prompt, policy):
    """By the number of the prompt each fails in its own way, the last not at all."""
    await policy.sample(max_tokens=4)
    if prompt.index == 0:
        return 1 / 0
    if prompt.index == 1:
        await asyncio.sleep(60)
    if prompt.index == 2:
        while True:
            await policy.sample(max_tokens=1)
    if prompt.index == 3:
        policy.tell("1" * 1000)
    if prompt.index == 4:
        sys.exit("the user's code")
    if prompt.index == 5:
        return float("nan")
    if prompt.index == 6:
        return "1.0"
    if prompt.index == 7:
        kept["policy"] = policy
        kept["late"] = asyncio.create_task(asyncio.sleep(0))
    return Outcome(2.5, correct=False, metrics={"calls": 3})


async def blocking(prompt, policy):
    time.sleep(1.5)
    return len(await policy.sample(max_tokens=2))


async def scored_by_functions(prompt, policy):
    await policy.sample(max_tokens=5)
    return None


def not_async(prompt, policy):
    return 0.0


async def one_argument(prompt):
    return 0.0


async def agent(prompt, policy):
    """Asks as a program would that knows nothing but a base_url, in three turns."""
    async with policy.endpoint() as endpoint, AsyncOpenAI(**vars(endpoint), max_retries=0) as client:
        messages = [{"role": "system", "content": "be-brief"}, {"role": "user", "content": prompt.text.replace(" ", "-")}]
        for question in ("so?", [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}], ""):
            answer = await client.chat.completions.create(model="any", messages=messages, max_tokens=12, stop="7")
            message = answer.choices[0].message.model_dump()
            messages += [message, {"role": "user", "content": question}]
        usage = answer.usage
        assert (usage.prompt_tokens, usage.total_tokens) == (
            usage.total_tokens - usage.completion_tokens,
            len(policy.token_ids),
        )
        kept[prompt.index] = messages[:-1]
    return float(len(message["content"]))


PROGRAM = """
import openai
answer = openai.OpenAI().chat.completions.create(model="m", messages=[{"role": "user", "content": "1+2="}], max_tokens=6)
print(answer.choices[0].finish_reason, end="")
"""


async def program(prompt, policy):
    """A program of its own, which finds the endpoint in its environment."""
    async with policy.endpoint() as endpoint:
        where = {"OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": endpoint.api_key}
        started = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, env=os.environ | where, stdout=-1)
        said, _ = await started.communicate()
    return Outcome(1.0, metrics={"length": said == b"length"})


async def wrong_requests(prompt, policy):
    """What each of several wrong requests was answered."""
    hello = [{"role": "user", "content": "hello"}]
    async with policy.endpoint() as endpoint:
        async with AsyncOpenAI(**vars(endpoint), max_retries=0) as client:
            ask = partial(client.chat.completions.create, model="any", max_tokens=4)
            first = await ask(messages=hello)
            said = {"role": "assistant", "content": first.choices[0].message.content}
            more = [*hello, said, {"role": "user", "content": "more"}]
            for name, request in {
                "rewritten": dict(messages=[{"role": "user", "content": "bye"}, *more[1:]]),
                "branched": dict(messages=[hello[0], {"role": "user", "content": "more"}]),
                "repeated": dict(messages=hello),
                "picture": dict(messages=[*more, {"role": "user", "content": [{"type": "image_url"}]}]),
                "several": dict(messages=more, n=2),
                "streamed": dict(messages=more, stream=True),
                "too long": dict(messages=[*more[:2], {"role": "user", "content": "x" * 500}]),
                "right": dict(messages=more),
            }.items():
                try:
                    answer = await ask(**request)
                    kept[name] = "answered"
                except APIStatusError as error:
                    kept[name] = (error.status_code, error.body["code"], error.body["message"])
        async with AsyncOpenAI(base_url=endpoint.base_url, api_key="guessed", max_retries=0) as client:
            with contextlib.suppress(AuthenticationError):
                await client.chat.completions.create(model="any", messages=more)
                kept["guessed"] = "answered"
        more += [{"role": "assistant", "content": answer.choices[0].message.content}]
        both = [client_request(endpoint, [*more, {"role": "user", "content": str(n)}]) for n in range(2)]
        kept["both"] = sorted(await asyncio.gather(*both))
    kept["url"] = endpoint.base_url
    return 1.0


async def client_request(endpoint, messages):
    async with ClientSession() as session:
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        body = {"messages": messages, "max_tokens": 60}
        async with session.post(f"{endpoint.base_url}/chat/completions", json=body, headers=headers) as reply:
            return reply.status
