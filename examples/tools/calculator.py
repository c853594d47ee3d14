"""A calculator as a tool: where the policy writes a question mark, it is told what is left after the next operation.

17+25-11=?  is answered  42-11=  and the policy goes on. It may also work a step out by itself, and is often wrong then: that
asking pays is what it has to find out from the reward, which is the answer's alone. examples/tools/run.sh trains it.
"""

import re

from pmpo_megatron.rollout.policy import Outcome

ASKED = re.compile(r"(\d+)([+-])(\d+)((?:[+-]\d+)*)=\?$")
ANSWER = re.compile(r"\\boxed\{(\d+)\}")


async def episode(prompt, policy):
    asked = 0
    await policy.sample(stop="?")
    while question := ASKED.search(prompt.text + policy.text):
        left, sign, right, rest = question.groups()
        value = int(left) + int(right) if sign == "+" else int(left) - int(right)
        policy.tell(f"{value}{rest}=" if rest else f"{value}")
        asked += 1
        await policy.sample(stop="?")
    answers = ANSWER.findall(policy.text)
    return Outcome(float(answers[-1:] == [*prompt.answers]), metrics={"asked": asked})
