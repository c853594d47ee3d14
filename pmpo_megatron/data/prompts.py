"""Prompts from files, Hugging Face data sets or generated tasks: read, put into a template, tokenised, filtered."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpo_megatron.config import Section, build, setting, to_plain
from pmpo_megatron.data.generated import TASKS, make_problems
from pmpo_megatron.data.tokenizer import encode
from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.types import Prompt, to_token_ids

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SOURCE_NAME = re.compile(r"[\w.-]+", re.ASCII)
BOXED = "Please reason step by step, and put your final answer within \\boxed{{}}."
TEMPLATES = {
    "plain": "{problem}",
    # https://github.com/QwenLM/Qwen2.5-Math: the chat format written out, for base models whose tokenizer has none
    "qwen-math": "<|im_start|>system\n" + BOXED + "<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n",
    # DeepSeek-R1: no system prompt, the thinking tag opened (model card, "Usage Recommendations")
    "r1": "<｜begin▁of▁sentence｜><｜User｜>{problem}\n" + BOXED + "<｜Assistant｜><think>\n",
}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where problems come from and how they become prompts."""

    source: str | None = setting(
        None,
        f"a .jsonl or .parquet file, a Hugging Face data set (name or directory), or a generated task ({', '.join(TASKS)}); "
        "needed without sources",
    )
    sources: dict[str, dict[str, Any]] = setting(
        {}, "several sources instead: for each name the fields of this section that it has of its own"
    )
    weight: float = setting(1.0, "of one among several sources: its prompts are weight / (sum of weights) of all", above=0.0)
    rewards: dict[str, float] | None = setting(None, "weight of each reward function here; null: rewards.functions")
    split: str = setting("train", "Hugging Face data set: its split; generated: train or test, which never overlap")
    subset: str | None = setting(None, "Hugging Face data set: its configuration, where it has several")
    problem_field: str = setting("problem", "field that holds the problem")
    answer_field: str | None = setting(
        "answer", "field that holds the answer, or a list of them; null: rows have tests instead"
    )
    answer_after: str | None = setting(None, "the answer is what follows the last such text in its field: '####' for GSM8K")
    template: str = setting("plain", f"{', '.join(TEMPLATES)}, chat (the tokenizer's own), or a text that contains {{problem}}")
    system_prompt: str | None = setting(None, "template chat: the system message")
    max_prompt_tokens: int = setting(1024, "longer prompts are left out, and counted", unit="tokens", minimum=1)
    max_problems: int | None = setting(None, "problems that are read, from the first on; null: all", minimum=1)
    problems: int = setting(4096, "generated: how many", minimum=1, maximum=1_000_000)
    levels: tuple[int, ...] = setting(
        (1, 2, 3), "generated: difficulty levels, taken in turn; arithmetic from 4 on: so many dependent operations"
    )
    seed: int = setting(0, "generated: seed of the problems", minimum=0)

    def parts(self) -> dict[str, DataConfig]:
        """Every source by its name; where there is one alone it is called ''."""
        if not self.sources:
            return {"": self}
        shared = {name: value for name, value in to_plain(self).items() if name not in ("source", "sources")}
        found = {}
        for name, values in self.sources.items():
            if not SOURCE_NAME.fullmatch(name):
                raise ConfigError("sources", f"{name!r}: a name has letters, digits, points, - and _, for metrics bear it")
            if once := sorted({"sources", "max_prompt_tokens"} & values.keys()):
                raise ConfigError(f"sources.{name}", f"{once[0]} stands beside sources, once for all of them")
            try:
                found[name] = build(DataConfig, shared | values)
            except ConfigError as error:
                raise error.within(f"sources.{name}") from None
        return found

    def validate(self) -> None:
        if (self.source is None) != bool(self.sources):
            raise ConfigError("source", f"is required, or sources; not both: a file, a data set, or one of {', '.join(TASKS)}")
        if self.rewards == {}:
            raise ConfigError("rewards", "is empty: name a function, or null for those of rewards.functions")
        if self.sources:
            self.parts()
        if self.template not in TEMPLATES and self.template != "chat" and "{problem}" not in self.template:
            raise ConfigError(
                "template", f"{self.template!r} is not one of {', '.join(TEMPLATES)}, chat, and has no {{problem}}"
            )
        if self.system_prompt is not None and self.template != "chat":
            raise ConfigError("system_prompt", f"has no effect with template {self.template!r}; only with chat")
        if self.source in TASKS:
            known = TASKS[self.source].levels
            if self.split not in ("train", "test"):
                raise ConfigError("split", f"{self.split!r}: {self.source} has train and test")
            if not self.levels or not set(self.levels) <= set(known):
                raise ConfigError("levels", f"{list(self.levels)}: the levels of {self.source} are {known[0]} to {known[-1]}")


@dataclass(frozen=True)
class PromptSet:
    """All prompts, source after source, how many problems were left out because they were too long, and a token as text.

    ``weights`` are those of the sources, by name.
    """

    prompts: tuple[Prompt, ...]
    too_long: int
    weights: Mapping[str, float]
    decode: Callable[[int], str] = str

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def check_rows(config: DataConfig) -> int:
    """Reads all problems as `load_prompts` does, without a tokenizer; how many there are.

    Raises:
        DataError, ConfigError: as `load_prompts`.
    """
    total = 0
    for part in config.parts().values():
        count = 0
        for where, row in read_rows(part):
            _fields(part, where, row)
            count += 1
        if not count:
            raise ConfigError("data.source", f"{part.source}: holds no problem")
        total += count
    return total


def load_prompts(config: DataConfig, tokenizer: Any, *, vocab_size: int | None = None) -> PromptSet:
    """Reads, formats and tokenises all problems of the source, or of all sources.

    Args:
        tokenizer: of transformers.
        vocab_size: of the model, if it is known: its embedding has no row for a greater token.

    Raises:
        DataError: a file cannot be read, or a line or row lacks a field, holds another type, or has no token; gives file
            and line.
        ConfigError: no problem is short enough, or the tokenizer is another model's.
    """
    prompts: list[Prompt] = []
    too_long, parts = 0, config.parts()
    for name, part in parts.items():
        too_long += _load_source(prompts, name, part, tokenizer, vocab_size)
    return PromptSet(tuple(prompts), too_long, {name: part.weight for name, part in parts.items()}, tokenizer.decode)


def _load_source(prompts: list[Prompt], source: str, config: DataConfig, tokenizer: Any, vocab_size: int | None) -> int:
    """Adds those of one source to ``prompts``; how many were too long."""
    too_long, before = 0, len(prompts)
    for where, row in read_rows(config):
        problem, answers = _fields(config, where, row)
        text, special = render(config, problem, tokenizer)
        token_ids = encode(tokenizer, text, special, where)
        if vocab_size is not None and max(token_ids) >= vocab_size:
            raise ConfigError(
                "model.path",
                f"its tokenizer gives token {max(token_ids)} ({where}), but the model has only {vocab_size} tokens",
            )
        if len(token_ids) > config.max_prompt_tokens:
            too_long += 1
            continue
        metadata = {name: value for name, value in row.items() if name not in (config.problem_field, config.answer_field)}
        if source:
            metadata.setdefault("source", source)
        ids = to_token_ids(token_ids)
        prompts.append(Prompt(len(prompts), ids, problem, answers, metadata, source, config.rewards))
    if len(prompts) == before:
        raise ConfigError("data.source", f"{config.source}: no prompt is left ({too_long} too long)")
    return too_long


def render(config: DataConfig, problem: str, tokenizer: Any) -> tuple[str, bool]:
    """(prompt text, whether the tokenizer should add its special tokens): a template that writes them out wants no more."""
    if config.template == "chat":
        messages = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        messages.append({"role": "user", "content": problem})
        if not tokenizer.chat_template:
            raise ConfigError("data.template", "chat: the model's tokenizer has no chat template; name another")
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), False
        except Exception as error:  # a template is a program of the model's
            raise ConfigError("data.template", f"chat: the tokenizer's chat template fails: {error!r}") from None
    template = TEMPLATES.get(config.template, config.template)
    return template.replace("{{}}", "{}").replace("{problem}", problem), config.template not in ("qwen-math", "r1")


def read_rows(config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every problem of the source; ``where`` is file and line, for messages."""
    rows = _source(config)
    for number, row in enumerate(rows):
        if config.max_problems is not None and number >= config.max_problems:
            return
        yield row


def _source(config: DataConfig) -> Iterable[tuple[str, dict[str, Any]]]:
    assert config.source is not None  # one source
    if config.source in TASKS:
        held_out, answer = config.split == "test", config.answer_field or "answer"
        problems = make_problems(config.source, config.problems, levels=config.levels, seed=config.seed, held_out=held_out)
        return (
            (f"{config.source} {i}", {config.problem_field: p.text, answer: p.answer, "level": p.level, **p.fields})
            for i, p in enumerate(problems)
        )
    path = Path(config.source)
    if path.suffix in (".jsonl", ".json"):
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    return _dataset(config)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    with lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8: {error}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a {type(row).__name__}, not an object")
            yield f"{path}:{number}", row


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}: row {number}", row


def _dataset(config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(config.source, config.subset, split=config.split)
    except Exception as error:  # the library raises its own, urllib's and OS errors; all mean the same here
        raise DataError(f"data.source {config.source!r} is neither a .jsonl or .parquet file nor a data set: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{config.source}[{config.split}]: row {number}", row


def _fields(config: DataConfig, where: str, row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    for name in filter(None, (config.problem_field, config.answer_field)):
        if row.get(name) is None:
            raise DataError(f"{where}: no field {name!r}; it has {', '.join(row)}")
    problem = row[config.problem_field]
    if not isinstance(problem, str):
        raise DataError(f"{where}: field {config.problem_field!r} is a {type(problem).__name__}, not text")
    if not problem.strip():
        raise DataError(f"{where}: field {config.problem_field!r} is empty")
    answer = [] if config.answer_field is None else row[config.answer_field]
    answers = answer if isinstance(answer, list) else [answer]
    if config.answer_field and not answers or not all(map(_is_answer, answers)):
        raise DataError(f"{where}: field {config.answer_field!r} is neither text, a number nor a list of them: {answer!r:.80}")
    texts = [str(a) for a in answers]
    if any(LONE_SURROGATE.search(text) for text in (problem, *texts)):
        raise DataError(f"{where}: a text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    if config.answer_after is not None:
        if missing := [text for text in texts if config.answer_after not in text]:
            raise DataError(f"{where}: no {config.answer_after!r} in the answer {missing[0][-80:]!r}")
        texts = [text.rpartition(config.answer_after)[2].strip() for text in texts]
    return problem, tuple(texts)


def _is_answer(value: object) -> bool:
    """Text that is not blank, or a finite number: nothing else can ever be a response's answer."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
