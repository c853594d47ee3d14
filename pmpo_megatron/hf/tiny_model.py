"""A tiny model for the generated tasks: its tokenizer, its supervised warm start, a normal Hugging Face checkpoint."""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pmpo_megatron.data.generated import TASKS, make_problems
from pmpo_megatron.data.problems import Memory, Problem

logger = logging.getLogger(__name__)

PAD, END = "<pad>", "<end>"
ALPHABET = "0123456789+-*/=()., \n?:ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\\{}$^_<>|"
BATCH = 32
TEXTS = 1000  # problems of each task from which a vocabulary is learned
LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class TinyModelConfig:
    """Sizes and training of the tiny model.

    The worked solutions that it learns from are those of somebody who misremembers: most facts, such as sums of digits, are
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
    tasks: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"arithmetic": (4, 5)})  # name -> levels
    slip_rate: float = 0.8  # of the worst fact
    slip_skew: float = 0.0  # the smaller, the more facts are doubtful (`Memory.skew`); 0: each task's own
    call_rate: float = 0.0  # of steps that are asked of a calculator
    vocabulary: int = (
        0  # tokens that are learned from the tasks' texts; 0: one for each character, which arithmetic needs alone
    )
    positions: int = 256
    endless: bool = False  # no end token, so that responses go on to the limit; only without warm start
    seed: int = 0


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each character; whatever is not in the alphabet is dropped."""
    vocabulary = {token: number for number, token in enumerate([PAD, END, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.normalizer = normalizers.Replace(Regex(f"[^{re.escape(ALPHABET)}]"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=PAD, clean_up_tokenization_spaces=False
    )


def learn_tokenizer(config: TinyModelConfig) -> transformers.PreTrainedTokenizerFast:
    """Qwen2's kind, bytes and what is merged of them, learned from the tasks' texts.

    Transformers' AutoTokenizer, and with it vLLM, reads the tokenizer of a Qwen2 checkpoint as this kind whatever it is.
    """
    symbols = [PAD, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    kind = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=PAD, pad_token=PAD, eos_token=END)
    texts = []
    for task, levels in config.tasks.items():
        for problem in make_problems(task, TEXTS, levels=levels, seed=config.seed):
            texts += [problem.text, TASKS[task].solve(problem)]
    return kind.train_new_from_iterator(texts, config.vocabulary, show_progress=False)


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
    tokenizer = learn_tokenizer(config) if config.vocabulary else make_tokenizer()
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
    """Supervised training on problems and solutions, a task in each step, the loss on the solutions alone; prints progress."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _height((step + 1) / max(config.steps, 1)))
    generator = np.random.default_rng(config.seed)
    memories = {
        task: Memory(config.slip_rate, config.slip_skew or TASKS[task].skew, config.seed, config.call_rate)
        for task in config.tasks
    }
    tasks, started = [*config.tasks], time.monotonic()
    for step in range(1, config.steps + 1):
        task = tasks[step % len(tasks)]
        problems = make_problems(task, BATCH, levels=config.tasks[task], seed=config.seed + step)
        solutions = [TASKS[task].solve(problem, memory=memories[task], generator=generator) for problem in problems]
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
