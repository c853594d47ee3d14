"""Layers for where Transformer Engine is absent: RMSNorm and attention on PyTorch's SDPA.

Legend: L tokens on this rank, q/k/v [L, 1, heads, head_dim] as [1, heads, L, head_dim] for SDPA.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from pmpo_megatron.parallel.shards import context_order, context_spans

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

QUERY_BLOCK = 512  # rows of an explicit causal mask that exist at once


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, with what attention needs of it: no synchronisation per layer.

    ``runs`` has, for several sequences whole on this rank, (length, first token, end) of neighbours of equal length;
    `pmpo_megatron.data.split` puts sequences of like length side by side.
    """

    boundaries: tuple[int, ...] = ()
    on_host: PackedSequences | None = None  # the same with cu_seqlens on the host, where nobody waits who looks at them
    gather_order: torch.Tensor | None = None  # int64 [T], `shards.context_order`, where context parallel
    runs: tuple[tuple[int, int, int], ...] = ()


def packed_sequences(boundaries: tuple[int, ...], *, context_size: int, device: torch.device) -> PackedSequences:
    """For sequences between the global, padded ``boundaries`` (the last one is the number of tokens of all ranks)."""
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    longest = max(end - start for start, end in pairwise(boundaries))
    order = context_order(boundaries, size=context_size).to(device) if context_size > 1 else None
    on_host = PackedSequences(
        **_lengths(cu_seqlens, longest),
        boundaries=boundaries,
        gather_order=order,
        runs=_runs(boundaries) if context_size == 1 and len(boundaries) > 2 else (),
    )
    return replace(on_host, **_lengths(cu_seqlens.to(device), longest), on_host=on_host)


def _lengths(cu_seqlens: torch.Tensor, longest: int) -> dict[str, Any]:
    """Megatron's description: what is padded counts as part of its sequence."""
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    return dict.fromkeys(names, cu_seqlens) | {"qkv_format": "thd", "max_seqlen_q": longest, "max_seqlen_kv": longest}


def _runs(boundaries: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    runs, first = [], boundaries[0]
    for length, alike in groupby(end - start for start, end in pairwise(boundaries)):
        runs.append((length, first, first + length * len([*alike])))
        first = runs[-1][2]
    return tuple(runs)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension. Stock torch norms refuse sequence parallelism inside Megatron."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: Any) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight: Any = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        weight.sequence_parallel = config.sequence_parallel  # its gradient is summed over the tensor-parallel group
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HostLengthsAttention(SelfAttention):
    """Megatron's attention, which rotates packed sequences by lengths that are on the host.

    Megatron's own rotation (megatron-core 0.16.1 and 0.19.2, rope_utils.py, `_apply_rotary_pos_emb_thd`) makes lists of them,
    of queries and of keys: with lengths on the GPU, the host waits for it twice in every layer.
    """

    def forward(self, *arguments: Any, packed_seq_params: PackedSequences | None = None, **more: Any) -> Any:
        on_host = packed_seq_params.on_host if packed_seq_params is not None else None
        return super().forward(*arguments, packed_seq_params=on_host, **more)


class CoreAttention(MegatronModule):
    """Causal attention inside each packed sequence, grouped queries, context parallel by gathering keys and values.

    The gather's backward is a reduce-scatter over the context-parallel group: every rank adds its queries' part.
    Sequences of one call are independent: nothing leaks between neighbours in the packing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *ignored: Any,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection,
        **also_ignored: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.cp_group = pg_collection.cp

    def sharded_state_dict(self, *ignored: Any, **also_ignored: Any) -> dict[str, Any]:
        return {}  # no parameters

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """[L, heads, d] each, packed; or [s, 1, heads, d] for one whole sequence. Returns [L, heads * d] or [s, 1, ...]."""
        packed = packed_seq_params is not None
        if packed_seq_params is not None:
            boundaries, order = packed_seq_params.boundaries, packed_seq_params.gather_order
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        else:
            size = self.cp_group.size()
            boundaries = (0, query.shape[0] * size)
            order = context_order(boundaries, size=size).to(query.device) if size > 1 else None
        if order is not None:
            key, value = self._gather(key, value, order)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if packed_seq_params is not None and packed_seq_params.runs:
            out = self._attend_runs(q, k, v, packed_seq_params.runs)
        else:
            out = torch.cat(self._attend(q, k, v, boundaries), dim=2).permute(2, 0, 1, 3)
        return out.reshape(out.shape[0], -1) if packed else out.reshape(*out.shape[:2], -1)

    def _gather(self, key: torch.Tensor, value: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all context-parallel ranks, in global order."""
        both = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1).contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
        )
        return both.index_select(0, order).split([key.shape[-1], value.shape[-1]], dim=-1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, boundaries: tuple[int, ...]) -> list[torch.Tensor]:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        outputs, offset = [], 0
        for start, end in pairwise(boundaries):
            for first, last in context_spans(start, end, size=size, rank=rank):
                queries = q[:, :, offset : offset + last - first]
                offset += last - first
                outputs.extend(self._attend_span(queries, k[:, :, start:last], v[:, :, start:last]))
        return outputs

    def _attend_runs(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: tuple[tuple[int, int, int], ...]
    ) -> torch.Tensor:
        """Neighbours of equal length go through attention together: where they are short, calls are what costs. [L, 1, ...]."""
        v = v.contiguous()  # a view of the fused projection's output would keep all of that for the backward pass
        outputs = []
        for length, start, end in runs:
            queries, keys, values = (x[0, :, start:end].unflatten(1, (-1, length)).transpose(0, 1) for x in (q, k, v))
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=self.scale, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).unsqueeze(1)

    def _attend_span(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Queries that are the last ones of the keys' span: causal, aligned at the lower right."""
        if q.shape[2] == k.shape[2]:
            return [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)]
        if _has_flash_attention(q):  # it knows this shape; with an explicit mask and grouped queries scores would be stored
            bias = causal_lower_right(q.shape[2], k.shape[2])
            return [F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale, enable_gqa=True)]
        earlier, outputs = k.shape[2] - q.shape[2], []
        for begin in range(0, q.shape[2], QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, q.shape[2])
            reach = earlier + end
            mask = _causal_mask(end - begin, reach, q)
            with _rebuilt_in_backward(mask):
                outputs.append(
                    F.scaled_dot_product_attention(
                        q[:, :, begin:end],
                        k[:, :, :reach],
                        v[:, :, :reach],
                        attn_mask=mask,
                        scale=self.scale,
                        enable_gqa=True,
                    )
                )
        return outputs


def _has_flash_attention(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float32


def _causal_mask(rows: int, reach: int, like: torch.Tensor) -> torch.Tensor:
    """[rows, reach], added to attention scores: 0, and -inf on what lies after each of the last ``rows`` positions."""
    return torch.full((rows, reach), float("-inf"), dtype=like.dtype, device=like.device).triu(reach - rows + 1)


def _rebuilt_in_backward(mask: torch.Tensor) -> AbstractContextManager[Any]:
    """Autograd keeps the mask's size instead of the mask: the masks of a trajectory grow with the square of its length."""
    rows, reach = mask.shape
    address, like = mask.data_ptr(), mask.new_empty(0)

    def pack(saved: torch.Tensor) -> torch.Tensor | torch.Size:
        is_mask = saved.data_ptr() == address and saved.shape[-2:] == (rows, reach)
        return saved.shape if is_mask else saved

    def unpack(kept: torch.Tensor | torch.Size) -> torch.Tensor:
        return _causal_mask(rows, reach, like).expand(kept) if isinstance(kept, torch.Size) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
