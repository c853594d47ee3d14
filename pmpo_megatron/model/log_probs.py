"""Hidden states -> log-prob of each target token and entropy, vocabulary-parallel, never the whole logits.

Forward and backward go over chunks of tokens and recompute the chunk's logits: the peak is about two [chunk, V] float32
buffers instead of several [T, V], at the price of one more matrix product with the vocabulary than the plain way.

Legend: T tokens (the same on every tensor-parallel rank), C tokens of a chunk, V vocabulary rows on this rank, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pmpo_megatron.parallel.state import ParallelState


def token_log_probs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
    group: dist.ProcessGroup | None = None,
    entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob of every target, and the entropy, of softmax(hidden @ weight.T / temperature) over the vocabulary.

    Args:
        hidden_TH: [T, H], equal on all ranks of ``group``; its gradient here is this rank's part of a sum over them.
        weight_VH: [V, H], this rank's rows: rows rank*V .. of the padded vocabulary.
        targets_T: int64 [T] in [0, vocab_size).
        vocab_size: true size; padded rows beyond it take no part and get gradient zero.
        chunk_tokens: tokens whose logits exist at once.
        group: tensor-parallel group; None: the weight is whole.
        entropy: whether it is wanted; the log-probs have the same bits either way.

    Returns:
        float32 [T] log-probs and float32 [T] entropies in nats (or None), equal on all ranks of ``group``.
    """
    vocabulary = _VocabularyShard.of(weight_VH.shape[0], vocab_size, group)
    return _ChunkedLogProbs.apply(hidden_TH, weight_VH, targets_T, vocabulary, temperature, chunk_tokens, entropy)


@dataclass(frozen=True)
class _VocabularyShard:
    """This rank's rows of the vocabulary: ``valid`` of them, from row ``start``; padding excluded."""

    group: dist.ProcessGroup | None
    start: int
    valid: int

    @staticmethod
    def of(rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> _VocabularyShard:
        start = rows * (group.rank() if group is not None else 0)
        return _VocabularyShard(group, start, max(0, min(rows, vocab_size - start)))

    def local(self, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(row on this rank, clamped [C]; whether the target lies on this rank [C])."""
        row_C = targets_C - self.start
        return row_C.clamp(0, max(self.valid - 1, 0)), (row_C >= 0) & (row_C < self.valid)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """[ranks, ...] of every rank's ``local``. No gradient."""
        if self.group is None or self.group.size() == 1:
            return local.unsqueeze(0)
        gathered = local.new_empty(self.group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group)
        return gathered.view(self.group.size(), *local.shape)


class _ChunkedLogProbs(torch.autograd.Function):
    """See `token_log_probs`. Backward: d log p(y) / d logit = onehot - p;  dS / d logit = -p (logit - E[logit])."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        vocabulary: _VocabularyShard,
        temperature: float,
        chunk_tokens: int,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        statistics = hidden_TH.new_zeros(3 if entropy else 2, hidden_TH.shape[0], dtype=torch.float32)
        for part in _chunks(hidden_TH.shape[0], chunk_tokens):
            _chunk_statistics(statistics[:, part], hidden_TH[part], weight_VH, targets_T[part], vocabulary, temperature)
        parts = vocabulary.gather(statistics) if statistics.numel() else statistics.unsqueeze(0)
        log_sum_T = torch.logsumexp(parts[:, 0], dim=0)
        mean_logit_T = (torch.exp(parts[:, 0] - log_sum_T) * parts[:, 2]).sum(0) if entropy else None
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, log_sum_T, mean_logit_T)
        ctx.settings = vocabulary, temperature, chunk_tokens
        return parts[:, 1].sum(0) - log_sum_T, None if mean_logit_T is None else log_sum_T - mean_logit_T

    @staticmethod
    def backward(
        ctx: Any, grad_log_prob_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weight_VH, targets_T, log_sum_T, mean_logit_T = ctx.saved_tensors
        vocabulary, temperature, chunk_tokens = ctx.settings
        valid = vocabulary.valid
        grad_hidden_TH = torch.zeros_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for part in _chunks(hidden_TH.shape[0], chunk_tokens):
            logits_CV = _logits(hidden_TH[part], weight_VH[:valid], temperature)
            grad_CV = _grad_logits(
                logits_CV,
                log_sum_T[part],
                None if mean_logit_T is None else mean_logit_T[part],
                None if grad_log_prob_T is None else grad_log_prob_T[part],
                None if grad_entropy_T is None else grad_entropy_T[part],
                vocabulary.local(targets_T[part]),
            ).div_(temperature)
            del logits_CV  # same memory as grad_CV unless the entropy has a gradient
            grad_hidden_TH[part] = _product(grad_CV.to(weight_VH.dtype), weight_VH[:valid])
            _add_product(grad_weight_VH[:valid], grad_CV.to(hidden_TH.dtype).t(), hidden_TH[part])
            del grad_CV  # or the next chunk's logits would be a second buffer beside it
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _chunk_statistics(
    out_QC: torch.Tensor,
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_C: torch.Tensor,
    vocabulary: _VocabularyShard,
    temperature: float,
) -> None:
    """Writes log-sum-exp, the target's logit (0 if elsewhere) and, if Q is 3, the mean logit under this rank's softmax."""
    if vocabulary.valid == 0:
        out_QC[0] = float("-inf")
        return
    logits_CV = _logits(hidden_CH, weight_VH[: vocabulary.valid], temperature)
    row_C, here_C = vocabulary.local(targets_C)
    out_QC[1] = torch.where(here_C, logits_CV.gather(1, row_C.unsqueeze(1)).squeeze(1), 0.0)
    largest_C1 = logits_CV.amax(dim=1, keepdim=True)
    logits_CV -= largest_C1
    weights_CV = logits_CV.exp() if len(out_QC) == 3 else logits_CV.exp_()
    sum_C = weights_CV.sum(dim=1)
    out_QC[0] = largest_C1.squeeze(1) + sum_C.log()
    if len(out_QC) == 3:
        out_QC[2] = largest_C1.squeeze(1) + weights_CV.mul_(logits_CV).sum(dim=1) / sum_C


def _grad_logits(
    logits_CV: torch.Tensor,
    log_sum_C: torch.Tensor,
    mean_logit_C: torch.Tensor | None,
    grad_log_prob_C: torch.Tensor | None,
    grad_entropy_C: torch.Tensor | None,
    target: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Gradient with respect to the (tempered) logits, [C, V]; overwrites ``logits_CV`` where it can."""
    deviation_CV = None if grad_entropy_C is None or mean_logit_C is None else logits_CV - mean_logit_C.unsqueeze(1)
    probability_CV = logits_CV.sub_(log_sum_C.unsqueeze(1)).exp_()
    if grad_log_prob_C is None:
        grad_log_prob_C = torch.zeros_like(log_sum_C)
    if deviation_CV is None or grad_entropy_C is None:
        grad_CV = probability_CV.mul_(-grad_log_prob_C.unsqueeze(1))
    else:
        factor_CV = deviation_CV.mul_(grad_entropy_C.unsqueeze(1)).add_(grad_log_prob_C.unsqueeze(1))
        grad_CV = probability_CV.mul_(factor_CV).neg_()
    row_C, here_C = target
    if grad_CV.shape[1]:
        grad_CV.scatter_add_(1, row_C.unsqueeze(1), torch.where(here_C, grad_log_prob_C, 0.0).unsqueeze(1))
    return grad_CV


def _logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_CV = _product(hidden_CH, weight_VH.t())
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, accumulated and returned in float32 whatever the operands' dtype."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # CPUs have no such product; policies are float32 there


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right in float32, without a temporary where the operands are float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += _product(left, right)


def score_hidden_states(
    hidden: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    wanted: torch.Tensor,
    *,
    state: ParallelState,
    vocab_size: int,
    temperature: float,
    chunk_tokens: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs, and entropies if they are wanted, from what the last pipeline stage returned: float32 [T] each.

    They have a gradient, and are 0 where ``wanted`` does not point.

    Args:
        hidden: [s, 1, H] of packed tokens, after the final norm; s is T, or this rank's part of it under sequence parallelism.
        weight_VH: of the output layer, this rank's rows; the embedding's where the two are tied.
        targets_T: int64 [T].
        wanted: int64 indices in [0, T) of the tokens to score.
    """
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    # Each rank's gradient of the hidden states covers its rows of the vocabulary only: both regions sum in backward.
    if state.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=state.tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=state.tp_group)
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    log_probs, entropies = token_log_probs(
        hidden_TH.index_select(0, wanted),
        weight_VH,
        targets_T.index_select(0, wanted),
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        group=state.tp_group,
        entropy=entropy,
    )
    empty_T = torch.zeros(hidden_TH.shape[0], dtype=torch.float32, device=hidden_TH.device)
    return empty_T.index_copy(0, wanted, log_probs), None if entropies is None else empty_T.index_copy(0, wanted, entropies)
