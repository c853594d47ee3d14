"""Which experts a vLLM sends every token to. On GPUs vLLM says it itself; on CPU (0.32) it refuses to, and its workers note it.

Legend: rows of a step, one for each token that it computes, of all its requests one after another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from pmpo_megatron.types import RouteFormat, Routes


class RouteRecorder:
    """Mixed into the workers of a vLLM on CPU, whose is ``self.model_runner``. All workers see the same tokens."""

    model_runner: Any

    def pmpo_record_routes(self, routes: RouteFormat) -> None:
        """From now on; tokens whose keys and values come from the prefix cache are not computed, and have no routes."""
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self._pmpo_format = routes
        self._pmpo_step: dict[int, torch.Tensor] = {}  # by layer: experts [rows, per_token]
        self._pmpo_noted: dict[str, list[tuple[np.ndarray, Routes]]] = defaultdict(list)  # by request: positions, routes
        for module in self.model_runner.model.modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(partial(self._pmpo_step.__setitem__, module.layer_id))
        self._pmpo_execute = self.model_runner.execute_model
        self.model_runner.execute_model = self._pmpo_execute_and_note

    def _pmpo_execute_and_note(self, scheduled: Any, *arguments: Any, **more: Any) -> Any:
        for request in scheduled.finished_req_ids:
            self._pmpo_noted.pop(_name(request), None)
        result = self._pmpo_execute(scheduled, *arguments, **more)
        counts = scheduled.num_scheduled_tokens
        total, first = sum(counts.values()), 0
        if not total:
            return result
        rows = np.full((total, self._pmpo_format.layers, self._pmpo_format.per_token), self._pmpo_format.unknown)
        for layer, ids in self._pmpo_step.items():
            rows[:, layer] = ids[:total].numpy()
        rows, positions = rows.astype(self._pmpo_format.dtype), self.model_runner.positions[:total].numpy().copy()
        for request in self.model_runner.input_batch.req_ids:
            span = slice(first, first := first + counts.get(request, 0))
            self._pmpo_noted[_name(request)].append((positions[span], rows[span]))
        return result

    def pmpo_take_routes(self, requests: Sequence[str]) -> list[Routes]:
        """Of each of ``requests``, which have just finished: [tokens of prompt and response, layers, per_token].

        The last token was sampled and never computed. What was computed twice, after its keys and values were given up, has
        the later routes.
        """
        taken = []
        for name in requests:
            parts = self._pmpo_noted.pop(name)
            positions = np.concatenate([part for part, _ in parts])
            routes = self._pmpo_format.whole(np.empty((0, *parts[0][1].shape[1:])), int(positions.max()) + 1)
            routes[positions] = np.concatenate([part for _, part in parts])
            taken.append(routes)
        return taken


def _name(request: str) -> str:
    """As the request was asked for: vLLM makes it unique by what follows the last hyphen."""
    return request.rpartition("-")[0]
