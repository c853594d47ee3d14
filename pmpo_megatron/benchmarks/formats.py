"""Rows of published code and choice benchmarks as rows of our own: a problem, and what its reward needs."""

from __future__ import annotations

import base64
import io
import json
import pickle
import string
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
PROGRAM = "Reply with the whole program, imports included, in one block of Python code."
LETTER = "Name the letter of the one correct option within \\boxed{}."


def human_eval(row: Row) -> dict[str, Any]:
    """HumanEval and HumanEval+ (``prompt``, ``test`` with check(candidate), ``entry_point``)."""
    problem = f"Complete this function. {PROGRAM}\n\n{_block(row['prompt'])}"
    return {"problem": problem, "tests": row["test"], "entry_point": row["entry_point"]}


def mbpp(row: Row) -> dict[str, Any]:
    """MBPP and MBPP+ (``prompt`` or ``text``, ``test_list``; the further tests of MBPP+ in ``test``)."""
    task, example = row.get("prompt") or row["text"], row["test_list"][0]
    problem = f"{task}\n{PROGRAM} It must pass this test:\n\n{_block(example)}"
    return {"problem": problem, "tests": row.get("test") or row["test_list"], "setup": row.get("test_imports") or ""}


def live_code_bench(row: Row) -> dict[str, Any]:
    """LiveCodeBench's code generation (``question_content``, ``starter_code``, ``public_`` and ``private_test_cases``)."""
    starter, metadata = row.get("starter_code"), row.get("metadata") or {}
    how = "It reads standard input and prints." if not starter else f"Begin with this code:\n\n{_block(starter)}"
    tests = [test for name in ("public_test_cases", "private_test_cases") for test in _test_cases(row[name])]
    known = json.loads(metadata) if isinstance(metadata, str) else metadata
    problem = f"{row['question_content']}\n\n{PROGRAM} {how}"
    return {"problem": problem, "tests": tests} | ({"func_name": known["func_name"]} if "func_name" in known else {})


def multiple_choice(row: Row) -> dict[str, Any]:
    """ARC, CommonsenseQA (``choices``, ``answerKey``), HellaSwag (``ctx``, ``endings``, ``label``), MMLU-Pro (``options``)."""
    if "endings" in row:
        question, options, correct = row["ctx"], row["endings"], int(row["label"])
    elif "choices" in row:
        labels = list(row["choices"]["label"])
        question, options, correct = row["question"], row["choices"]["text"], labels.index(row["answerKey"])
    else:
        question, options, correct = row["question"], row["options"], int(row["answer_index"])
    letters = string.ascii_uppercase[: len(options)]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    return {"problem": f"{question}\n\n{listed}\n\n{LETTER}", "answer": letters[correct], "options": list(options)}


def _block(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def _test_cases(text: str | Sequence[Row]) -> list[Row]:
    """A list, its JSON, or base64 of zlib of a pickled text of JSON, which is how LiveCodeBench hides its private tests.

    Raises:
        ValueError: none of these.
    """
    if not isinstance(text, str):
        return list(text)
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return json.loads(_TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())
    except (ValueError, zlib.error, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise ValueError(f"test cases are neither JSON nor packed as LiveCodeBench does it: {error}") from None


class _TextUnpickler(pickle.Unpickler):
    """Plain data alone: nothing that a pickle names is imported or called."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module_name}.{global_name}")
