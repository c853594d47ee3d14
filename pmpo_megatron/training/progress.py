"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pmpo_megatron.config import convert, field_types
from pmpo_megatron.errors import CheckpointError, ConfigError


@dataclass
class RunProgress:
    """Where a run stands: what a checkpoint holds beside the weights, the optimizer and the random states."""

    round: int = 0  # the next round
    policy_version: int = 0  # of the weights: counts rounds, or optimizer steps where each gives the engine new weights
    skipped_in_a_row: int = 0  # optimizer steps
    evaluated: int = -1  # the last round that was evaluated before
    sampler: dict[str, Any] = field(default_factory=dict)
    drawn: int = 0  # prompts that the sampler has given
    open: tuple[tuple[int, ...], ...] = ()  # of them, not trained on yet: the number of the draw, the prompt's index
    log: dict[str, Any] | None = None  # RunLog.cursor()
    accuracy: dict[str, float] = field(default_factory=dict)  # held-out, by round; keys are text, as JSON has them

    @staticmethod
    def of(values: dict[str, Any]) -> RunProgress:
        """What a checkpoint holds.

        Raises:
            CheckpointError: it is not the progress of a run; names the value.
        """
        hints = field_types(RunProgress)
        required = {"round", "policy_version", "sampler", "log"}
        if absent := sorted(required - values.keys()):
            raise CheckpointError(f"progress.json: damaged: {', '.join(absent)} is missing")
        if unknown := sorted(values.keys() - hints.keys()):
            raise CheckpointError(f"progress.json: {', '.join(unknown)}: unknown; written by another version?")
        try:
            found = RunProgress(**{name: convert(value, hints[name], name) for name, value in values.items()})
            convert([*found.accuracy.values()], tuple[float, ...], "accuracy")
            _check_places(found)
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"progress.json: damaged: {error}") from None
        return found


def _check_places(progress: RunProgress) -> None:
    """Raises where the positions that a run goes on from are not whole numbers of at least 0."""
    log, sampler = progress.log or {"step": 0, "bytes": {}}, progress.sampler
    places = {f"log.bytes.{name}": size for name, size in log["bytes"].items()} | {"log.step": log["step"]}
    places |= {f"sampler.{name}": sampler[name] for name in ("num_prompts", "seed", "epoch", "position") if sampler}
    places |= {"round": progress.round, "policy_version": progress.policy_version, "skipped": progress.skipped_in_a_row}
    places |= {f"accuracy of round {name}": int(name) for name in progress.accuracy} | {"drawn": progress.drawn}
    places |= {f"open[{n}][{k}]": value for n, draw in enumerate(progress.open) for k, value in enumerate(draw)}
    for name, value in places.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}")
