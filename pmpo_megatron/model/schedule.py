"""Megatron's schedule over micro-batches: passes forward through all pipeline stages and, where there is a loss, backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import torch

from pmpo_megatron.model.micro_batch import MicroBatch
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.model.routing import Routing

Work = tuple[MicroBatch, Callable[..., Any]]


def run_schedule(
    policy: Policy, work: Sequence[Work], routings: Sequence[Routing] | None = None, *, forward_only: bool
) -> list[Any]:
    """Megatron's schedule over ``work``: micro-batches, and what takes the hidden states of each on the last stage.

    ``routings`` are for the micro-batches' routers; None: these decide themselves.

    Returns:
        on the last stage what these returned, beside the loss where there is a backward; else an empty list.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator: Iterator[tuple], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        (batch, take), routing = next(iterator)
        for router in policy.routers[policy.chunks.index(model)]:
            router.tell(routing)
        hidden = model(batch.tokens_1T, batch.position_ids_1T, None, packed_seq_params=batch.sequences)
        return hidden, take

    for router in chain(*policy.routers):
        router.begin(trains=not forward_only)
    iterators = [zip(work, routings or repeat(None)) for _ in policy.chunks]  # noqa: B905  one of them has no end
    run = get_forward_backward_func()
    results: list[Any] = run(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(policy.chunks) if len(policy.chunks) > 1 else policy.chunks[0],
        num_microbatches=len(work),
        seq_length=max(batch.num_tokens for batch, _ in work),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    for router in chain(*policy.routers):
        router.begin(trains=False)
    return results
