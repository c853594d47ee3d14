"""What a rank reads of a distributed optimizer's state in a checkpoint: the parameters of which it owns a part, on the host.

Megatron's own way (megatron-core 0.16.1 and 0.19.2, optimizer/distrib_optimizer.py, `sharded_param_state_fully_reshardable`)
makes room for the states of all parameters on every data-parallel rank, and then uses this rank's part of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pmpo_megatron.model.optimizer import parts_of

FORMAT = "fully_reshardable"
STATES = ("param", "exp_avg", "exp_avg_sq")  # Megatron's names: the float32 copy of the weights, and Adam's two moments


def state_to_read(optimizer: Any, model_state: dict[str, Any]) -> list[dict[int, Any]]:
    """The sharded state of every part of ``optimizer`` with which dist_checkpointing reads a state of type `FORMAT`.

    Of a parameter that lies on several data-parallel ranks the one that owns its beginning is the main replica, so that each
    part is read as such once.

    Args:
        optimizer: Megatron's, distributed.
        model_state: the model's sharded state dictionary, which says how parameters are split.
    """
    described = _descriptions(model_state)
    return [
        {
            index: {name: _on_host(described[parameter], name, is_first) for name in STATES}
            for index, parameter, is_first in owned_parameters(part)
        }
        for part in parts_of(optimizer)
    ]


def load_state(optimizer: Any, saved: dict[Any, Any], states: list[dict[int, Any]]) -> None:
    """Fills ``optimizer`` with ``states``, which were read as `state_to_read` says.

    Args:
        saved: what the checkpoint holds beside tensors. A run with other expert parallelism has saved other parts, each with
            the number of updates, which is all that is taken: rates and decay are the schedule's.
    """
    groups = [group for part in _parts_of_saved(saved) for group in part["optimizer"]["param_groups"]]
    step = max(group["step"] for group in groups)
    for part, tensors in zip(parts_of(optimizer), states, strict=True):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = step
        part.load_state_dict(state | {"param_state": tensors, "param_state_sharding_type": FORMAT})


def _parts_of_saved(saved: dict[Any, Any]) -> list[dict[str, Any]]:
    """One dictionary, or one for each of several parts under its number (megatron-core 0.16.1 and 0.19.2, ChainedOptimizer)."""
    return [saved] if "optimizer" in saved else [part for number, part in saved.items() if isinstance(number, int)]


def owned_parameters(optimizer: Any) -> Iterator[tuple[int, torch.nn.Parameter, bool]]:
    """(number among all parameters of this rank's model, parameter, whether its beginning is owned, too) in that order."""
    index = 0
    for buffer, by_dtype in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        [buckets] = by_dtype.values()
        owned = {parameter: ranges for bucket in buckets for parameter, ranges in bucket["param_map"].items()}
        for parameter in buffer.param_index_map:
            if parameter in owned:
                yield index, parameter, owned[parameter]["param"].start == 0
            index += 1


def _descriptions(model_state: dict[str, Any]) -> dict[torch.nn.Parameter, Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    return {described.data: described for described in nested_values(tensors)}


def _on_host(described: Any, name: str, is_first: bool) -> Any:
    """``described``, a parameter's ShardedTensor or factory of such, as that of its state ``name``; memory of its own."""
    changes: dict[str, Any] = dict(
        key=f"optimizer.state.{name}.{described.key}",
        data=torch.empty(described.data.shape, dtype=torch.float32),
        replica_id=(*described.replica_id[:-1], 0 if is_first else 1),
    )
    if hasattr(described, "dtype"):  # a factory has none
        changes["dtype"] = torch.float32
    return replace(described, **changes)
