"""How weights travel to the rollout engine."""

from __future__ import annotations

from dataclasses import dataclass

from pmpo_megatron.config import Section, setting


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(Section):
    """How weights travel to the rollout engine, and how it is checked that they arrived."""

    transport: str = setting(
        "shared_memory", "shared memory of the host, or files in a directory both sides see", choices=("shared_memory", "disk")
    )
    directory: str | None = setting(
        None, "where the files of the transport are put; null: /dev/shm, or the temporary directory"
    )
    verify: str = setting(
        "full",
        "fingerprint of every received tensor: of all its bytes, of a sample, or none",
        choices=("full", "sample", "off"),
    )
