"""How responses are scored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pmpo_megatron.config import Section, setting
from pmpo_megatron.errors import ConfigError

LONGEST_TIMEOUT_S = 86400.0  # a day: timers of the system overflow far beyond it, and every response would score 0


@dataclass(frozen=True, kw_only=True)
class CodeConfig(Section):
    """How programs run for the function `code`. Limits are of one program on one test."""

    isolation: str = setting(
        "bubblewrap",
        "unsandboxed runs programs as your own user, who may lose what is theirs",
        choices=("bubblewrap", "unsandboxed"),
    )
    wall_s: float = setting(4.0, "time, and as much CPU time of a process", unit="s", above=0.0, maximum=LONGEST_TIMEOUT_S)
    memory_mib: int = setting(1024, "memory of all its processes, and address space of each", unit="MiB", minimum=64)
    processes: int = setting(16, "processes and threads", minimum=2, maximum=1024)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    """How responses are scored. The reward is the weighted sum of ``functions``, less the penalties."""

    functions: dict[str, float] = setting(
        {"math": 1.0},
        "weight of each function: math, boxed, exact, choice, code, or package.module:name of your own, "
        "(response, answers) or (response, answers, metadata) -> float, or responses of a group -> list; also async",
    )
    evaluated: bool = setting(
        True, "math: what is still to be evaluated, as 17+25 for 42, is no answer unless the accepted one is"
    )
    workers: int = setting(4, "worker processes", minimum=1)
    timeout_s: float = setting(
        5.0,
        "a function that takes longer scores 0 and its worker is killed",
        unit="s",
        above=0.0,
        maximum=LONGEST_TIMEOUT_S,
    )
    concurrency: int = setting(32, "async functions: calls of each under way at once", minimum=1, maximum=65536)
    attempts: int = setting(3, "async functions: a call that fails or takes longer is made so often", minimum=1, maximum=16)
    memory_gib: float = setting(4.0, "address space of a worker", unit="GiB", above=0.0)
    code: CodeConfig = setting(CodeConfig, "how the programs of code run")
    overlong_penalty: float = setting(0.0, "largest penalty for length (DAPO, 2503.14476 eq. 13); 0: none", minimum=0.0)
    overlong_tokens: int = setting(
        0, "the penalty grows over the last so many tokens before the limit", unit="tokens", minimum=0
    )

    def validate(self) -> None:
        if not self.functions:
            raise ConfigError("functions", "is empty: name at least one, e.g. {math: 1.0}")
        self.check_times(self.functions)
        if self.overlong_penalty and not self.overlong_tokens:
            raise ConfigError("overlong_tokens", "must be above 0 with overlong_penalty")

    def check_times(self, functions: Iterable[str]) -> None:
        """Raises ConfigError where a response of one of ``functions`` has less time than a part of it."""
        if "code" in functions and self.timeout_s <= self.code.wall_s:
            least = f"above code.wall_s, which is {self.code.wall_s:g}: it is for all tests of a response"
            raise ConfigError("timeout_s", f"{self.timeout_s:g} must be {least}")
