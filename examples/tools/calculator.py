"""A calculator as a tool: the policy writes <17+25>, is told 42, and goes on. The reward is the answer's alone.

    export PYTHONPATH=$PWD/examples/tools
    pmpo-train --config examples/tools/config.yaml

The policy may also work a step out by itself, and is often wrong then: that asking pays is what it has to find out.
"""

import re

from pmpo_megatron.rollout.policy import Outcome

CALL = re.compile(r"<(\d{1,4})([+-])(\d{1,4})>$")
ANSWER = re.compile(r"\\boxed\{(\d+)\}")


async def episode(prompt, policy):
    calls = 0
    while call := CALL.search(await policy.sample(stop=">")):
        left, sign, right = call.groups()
        policy.tell(str(int(left) + int(right) if sign == "+" else int(left) - int(right)))
        calls += 1
    answers = ANSWER.findall(policy.text)
    return Outcome(float(answers[-1:] == [*prompt.answers]), metrics={"calls": calls})
