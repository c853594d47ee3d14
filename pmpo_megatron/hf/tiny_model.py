"""A tiny model for the generated task: its tokenizer, its supervised warm start, a normal Hugging Face checkpoint."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from pmpo_megatron.data.arithmetic import Memory, Problem, make_problems, solve

logger = logging.getLogger(__name__)

PAD, END = "<pad>", "<end>"
ALPHABET = "0123456789+-*/=()., \n?:ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\\{}$^_<>|"
BATCH = 32
LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class TinyModelConfig:
    """Sizes and training of the tiny model.

    The worked solutions that it learns from are those of somebody who misremembers: most sums and differences of digits are
    nearly always right, some are more often wrong than right (`Memory`). So it knows the method, and neither its best guess
    nor what it samples solves most problems: both are left to learn from rewards.
    """

    layers: int = 3
    hidden_size: int = 128
    heads: int = 4
    key_value_heads: int = 2
    experts: int = 0  # of every layer's mixture; 0: one MLP of three times the hidden size instead
    experts_per_token: int = 2
    steps: int = 700
    levels: tuple[int, ...] = (4, 5)
    slip_rate: float = 0.8  # of the worst fact
    positions: int = 256
    endless: bool = False  # no end token, so that responses go on to the limit; only without warm start
    seed: int = 0


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each character; whatever is not in the alphabet is dropped."""
    vocabulary = {token: number for number, token in enumerate([PAD, END, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=PAD, clean_up_tokenization_spaces=False
    )


def make_model(config: TinyModelConfig, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedModel:
    """The untrained model, float32: a Qwen2, or a Qwen3 with a mixture of experts."""
    torch.manual_seed(config.seed)
    common: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        max_position_embeddings=config.positions,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None if config.endless else tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    if not config.experts:
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
    mixture: dict[str, Any] = dict(
        head_dim=config.hidden_size // config.heads,
        num_experts=config.experts,
        num_experts_per_tok=config.experts_per_token,
        moe_intermediate_size=3 * config.hidden_size // config.experts_per_token,  # as much work per token as without
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
    )
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**common, **mixture))


def make_tiny_model(out: Path, config: TinyModelConfig) -> None:
    """Trains and writes the model to ``out``, complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(config, tokenizer)
    if config.endless:
        tokenizer.eos_token = None
    warm_start(model, tokenizer, config)
    with tempfile.TemporaryDirectory(dir=out.parent) as directory:
        made = Path(directory) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(out)


def warm_start(model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, config: TinyModelConfig) -> None:
    """Supervised training on problems and solutions, the loss on the solutions alone; prints its progress."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _height((step + 1) / max(config.steps, 1)))
    generator, memory = np.random.default_rng(config.seed), Memory(config.slip_rate, seed=config.seed)
    started = time.monotonic()
    for step in range(1, config.steps + 1):
        problems = make_problems(BATCH, levels=config.levels, seed=config.seed + step)
        solutions = [solve(problem, memory=memory, generator=generator) for problem in problems]
        ids, labels = encode(problems, solutions, tokenizer)
        balanced = {"output_router_logits": True} if config.experts else {}  # adds the load-balancing loss
        loss = model(input_ids=ids, labels=labels, **balanced).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == config.steps:
            seconds = time.monotonic() - started
            print(f"warm start: step {step} of {config.steps}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def _height(share: float) -> float:
    """Share of the largest learning rate: it warms up over a tenth of the steps and decays over the last quarter, linearly."""
    return min(1.0, 10 * share, max(0.05, 4 * (1 - share)))


def encode(
    problems: list[Problem], solutions: list[str], tokenizer: transformers.PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), int64 [batch, longest]; labels are -100 on the problem and on padding."""
    rows = [
        (tokenizer.encode(problem.text), tokenizer.encode(solution) + [tokenizer.eos_token_id])
        for problem, solution in zip(problems, solutions, strict=True)
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = np.full((len(rows), longest), tokenizer.pad_token_id)
    labels = np.full((len(rows), longest), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = prompt + answer
        labels[i, len(prompt) : len(prompt) + len(answer)] = answer
    return torch.from_numpy(ids), torch.from_numpy(labels)
