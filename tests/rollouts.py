"""Rollouts as an engine would give them, for tests of what follows."""

from __future__ import annotations

from typing import Any

import numpy as np

from pmpo_megatron.types import Rollout


def rollout(text: str = "x", length: int = 1, **changes: Any) -> Rollout:
    """``length`` tokens of no meaning, by version 0."""
    zeros = np.zeros(length, dtype=np.int32)
    fields = dict(token_ids=zeros, log_probs=zeros.astype(np.float32), text=text, finish_reason="stop", versions=zeros, seed=0)
    return Rollout(**(fields | changes))
