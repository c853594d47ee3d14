"""What an evaluation leaves on disk, problem by problem, and how an interrupted one goes on.

Files in the directory of one model:
    settings.json       what the responses depend on; an evaluation goes on only with the same
    summary.json        the figures
    exported/           a Megatron checkpoint in Hugging Face's format, while it is evaluated
    <benchmark>.jsonl   one line per problem: {"index", "problem", "answers", "prompt_tokens", "responses": [...]}
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.monitor.jsonl import JsonLines, read_json_lines
from pmpo_megatron.types import Prompt

SETTINGS = "settings.json"
SUMMARY = "summary.json"
EXPORTED = "exported"
TOO_LONG = "prompt too long"  # finish reason of responses that were never asked for


@dataclass(frozen=True)
class Response:
    """One response, scored. ``finish_reason`` is stop, length, or `TOO_LONG`."""

    text: str
    score: float
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Record:
    """One problem with all its responses."""

    index: int
    problem: str
    answers: tuple[str, ...]
    prompt_tokens: int
    responses: tuple[Response, ...]

    @property
    def scores(self) -> list[float]:
        return [response.score for response in self.responses]


class BenchmarkRecords:
    """The records of one benchmark, in a file that is appended to. One process at a time: see `ModelDirectory`."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], *, samples: int) -> None:
        """Reads what is there.

        Raises:
            DataError: a line is damaged, or there twice.
            ConfigError: a line is of another problem than ``prompts`` has.
        """
        self.path = path
        self._file = JsonLines(path)
        self._found: dict[int, Record] = {}
        for number, values in enumerate(read_json_lines(path), 1):
            record = _read_record(values, f"{path}:{number}", samples)
            if record.index in self._found:
                raise DataError(f"{path}:{number}: problem {record.index} is there twice")
            self._found[record.index] = record
        self._prompts = prompts
        for prompt in prompts:
            self._check_same_problem(prompt)

    @property
    def missing(self) -> list[Prompt]:
        return [prompt for prompt in self._prompts if prompt.index not in self._found]

    @property
    def records(self) -> list[Record]:
        """Those of the prompts that there are, in order."""
        return [self._found[prompt.index] for prompt in self._prompts if prompt.index in self._found]

    def append(self, record: Record) -> None:
        self._file.append(asdict(record))
        self._found[record.index] = record

    def close(self) -> None:
        self._file.close()

    def _check_same_problem(self, prompt: Prompt) -> None:
        record = self._found.get(prompt.index)
        if record is None:
            return
        for name, recorded, present in (("problem", record.problem, prompt.text), ("answers", record.answers, prompt.answers)):
            if recorded != present:
                raise ConfigError(
                    f"{name} {prompt.index}",
                    f"{self.path} has {_short(recorded)}, the data now {_short(present)}; "
                    "start anew with --force, or write to another --out",
                )


class ModelDirectory:
    """The results of one model, held by one process until `close`."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, force: bool) -> None:
        """
        Args:
            settings: plain values that the responses depend on.
            force: records of an earlier evaluation are removed.

        Raises:
            ConfigError: the earlier evaluation had other settings, or another process works on it.
        """
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path / SETTINGS, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._hold()
            if force:
                for old in [*path.glob("*.jsonl"), path / SUMMARY]:
                    old.unlink(missing_ok=True)
            if any(records.stat().st_size for records in path.glob("*.jsonl")):
                self._check(settings)
            else:
                shutil.rmtree(path / EXPORTED, ignore_errors=True)  # a kill left it, perhaps of other weights
                self._write(settings)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        os.close(self._lock)

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("--out", f"another evaluation is writing to {self.path}") from None

    def _check(self, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.path / SETTINGS).read_text())
        except ValueError:
            raise DataError(f"{self.path / SETTINGS}: damaged; start anew with --force") from None
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise ConfigError(
                    name,
                    f"is {settings.get(name)!r}, but the evaluation in {self.path} began with {before.get(name)!r}; "
                    "use the same, start anew with --force, or write to another --out",
                )

    def _write(self, settings: Mapping[str, Any]) -> None:
        data = (json.dumps(dict(settings), indent=1, ensure_ascii=False) + "\n").encode()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, data, 0)


def _read_record(values: dict[str, Any], where: str, samples: int) -> Record:
    try:
        responses = tuple(Response(**response) for response in values["responses"])
        fields = {name: values[name] for name in ("index", "problem", "prompt_tokens")}
        record = Record(**fields, answers=tuple(values["answers"]), responses=responses)
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: not a record of an evaluation: {error!r}") from None
    if len(responses) != samples:
        raise DataError(f"{where}: {len(responses)} responses instead of {samples}")
    return record


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
