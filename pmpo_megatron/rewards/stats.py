"""What scoring has cost, function by function."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FunctionStats:
    """Counts of one reward function since its pool was made. ``errors`` are what it raised or returned wrongly, by text."""

    calls: int = 0  # of a response, or of a group
    seconds: float = 0.0  # that workers were busy with it, added up over workers
    timeouts: int = 0
    crashes: int = 0  # worker processes that died of it
    retries: int = 0  # of asynchronous calls
    errors: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """``12.3 s in 4096 calls, 3.0 ms each; 2 time-outs, 1 errors``: what did not happen is left out."""
        text = f"{self.seconds:.1f} s in {self.calls} calls, {1000 * self.seconds / max(self.calls, 1):.1f} ms each"
        counts = {"time-outs": self.timeouts, "crashes": self.crashes, "retries": self.retries, "errors": self.num_errors}
        unusual = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f"{text}; {unusual}" if unusual else text

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())


@dataclass
class PoolStats:
    """Counts since the pool was made; ``scored`` are responses."""

    functions: dict[str, FunctionStats]
    scored: int = 0

    @property
    def timeouts(self) -> int:
        return sum(stats.timeouts for stats in self.functions.values())

    @property
    def crashes(self) -> int:
        return sum(stats.crashes for stats in self.functions.values())

    @property
    def errors(self) -> dict[str, int]:
        """All functions' errors by text."""
        total: dict[str, int] = {}
        for stats in self.functions.values():
            for text, count in stats.errors.items():
                total[text] = total.get(text, 0) + count
        return total

    def metrics(self) -> dict[str, float]:
        """Numbers to log: all functions together, and ``rewards/<function>/...`` of each."""
        numbers: dict[str, float] = {"timeouts": self.timeouts, "crashes": self.crashes, "errors": sum(self.errors.values())}
        for name, stats in self.functions.items():
            numbers |= {f"{name}/seconds": stats.seconds, f"{name}/timeouts": stats.timeouts, f"{name}/crashes": stats.crashes}
            numbers |= {f"{name}/retries": stats.retries, f"{name}/errors": stats.num_errors}
        return {f"rewards/{name}": float(value) for name, value in numbers.items()}
