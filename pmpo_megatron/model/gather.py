"""Parameters that data-parallel ranks have updated in parts, gathered while the next forward pass goes on.

Megatron-Core's hooks (0.16.1 and 0.19.2, distributed_data_parallel.py, `_make_forward_pre_hook`) have every module wait for
its own parameters. Whoever reads parameters otherwise calls `finish` before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ParameterGather:
    """Of ``chunks``, Megatron's DDP with ``overlap_param_gather``; none where parameters are gathered at once.

    All gathers begin together: a hook that begins one by itself would leave ranks whose experts got no token behind.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        groups = [(*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups) for chunk in chunks]
        self._groups = [group for of_chunk in groups for group in reversed(of_chunk)]  # as forward passes need them
        self._begun = False
        for group in self._groups:
            group.start_param_sync(force_sync=True)  # nothing new: hooks shall find it done

    def start(self) -> None:
        """After an update, made or left out. Collective."""
        self.finish()  # modules that were not used have waited for nothing
        for group in self._groups:
            group.start_param_sync()
        self._begun = True

    def finish(self) -> None:
        """From here on all parameters are whole."""
        if self._begun:
            for group in self._groups:
                if group.param_gather_handle is not None:
                    group.start_param_sync(force_sync=True)  # waits for the one that is under way
            self._begun = False
