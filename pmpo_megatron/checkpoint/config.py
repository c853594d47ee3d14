"""When checkpoints are written, and how many are kept."""

from __future__ import annotations

from dataclasses import dataclass

from pmpo_megatron.config import Section, setting


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept. They go to ``checkpoints`` in the run's directory."""

    every_rounds: int = setting(10, "rounds between checkpoints; one more at the end, and when the run is stopped", minimum=1)
    keep: int = setting(2, "newest checkpoints kept; at least 2, so that a damaged one has a predecessor", minimum=2)
    keep_best: int = setting(
        0, "kept as well: the number of those with the highest held-out accuracy, where it was measured", minimum=0
    )
    keep_every: int | None = setting(None, "kept as well: checkpoints whose round is a multiple of this; null: none", minimum=1)
    asynchronous: bool = setting(False, "write while the next round goes on, from a copy in memory; the last one is waited for")
    resume: bool = setting(
        True, "go on from the newest whole checkpoint in the run's directory; false: start anew, and move what is there aside"
    )
