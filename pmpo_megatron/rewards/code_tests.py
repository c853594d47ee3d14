"""Tests of programs as data sets write them, and whether an output is the expected one (docs/rewards.md, "Programs")."""

from __future__ import annotations

import ast
import builtins
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pmpo_megatron.rewards.sandbox.inside.program import MODULES

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
PYTHON = ("", "python", "py", "python3")
TOLERANCE = 1e-6  # of numbers with a point or an exponent, relative and absolute


@dataclass(frozen=True)
class ScriptTest:
    """A program that reads ``stdin`` prints ``stdout``."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CallTest:
    """The program's function ``name``, called with ``arguments``, returns ``expected``."""

    name: str
    arguments: list
    expected: Any


@dataclass(frozen=True)
class Assertions:
    """Code that calls the program's functions ``names`` and raises if they are wrong."""

    code: str
    names: tuple[str, ...]


def last_program(response: str) -> str | None:
    """The last closed block of code in ``response`` that is marked as Python or not marked; None without any."""
    blocks = [text for language, text in FENCE.findall(response) if language.lower() in PYTHON]
    return blocks[-1] if blocks else None


def read_tests(metadata: Mapping[str, Any]) -> list[ScriptTest | CallTest | Assertions]:
    """The tests of a data row, in any of the layouts of docs/rewards.md, "Programs".

    Raises:
        ValueError: the row has none, or not in one of these layouts.
    """
    found: list[ScriptTest | CallTest | Assertions]
    tests = metadata.get("tests")
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        tests = json.loads(tests)
    name = metadata.get("fn_name") or metadata.get("func_name")
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= set(tests):
        name = tests.get("fn_name") or name
        found = [_one(given, wanted, name) for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True)]
    elif isinstance(tests, list) and tests and all(isinstance(test, Mapping) for test in tests):
        found = [_one(test["input"], test["output"], name if test.get("testtype") == "functional" else None) for test in tests]
    elif isinstance(tests, str) and tests.strip() or isinstance(tests, list) and tests and _texts(tests):
        found = [_assertions(tests, metadata)]
    else:
        raise ValueError("metadata.tests must be {inputs, outputs}, a list of {input, output}, or assertions")
    if not found or all(isinstance(test, ScriptTest) and not test.stdout.strip() for test in found):
        raise ValueError("metadata.tests has no test, or none with an output: the empty program would pass")
    return found


def same_output(output: str, expected: str) -> bool:
    """Whether two texts agree line by line, spaces at the ends and empty last lines aside; numbers with a point nearly."""
    lines, wanted = ([line.split() for line in text.rstrip().splitlines()] for text in (output, expected))
    if [len(line) for line in lines] != [len(line) for line in wanted]:
        return False
    pairs = zip(chain.from_iterable(lines), chain.from_iterable(wanted), strict=True)
    return all(word == other or _near(word, other) for word, other in pairs)


def same_value(value: object, expected: object) -> bool:
    """Whether plain data agree: lists and tuples alike, floats nearly, and a truth value is no number."""
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        texts = {str(key): item for key, item in value.items()}  # JSON has no other keys
        return set(texts) == set(expected) and all(same_value(texts[key], expected[key]) for key in expected)
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, float) or isinstance(expected, float):
        if not isinstance(value, (int, float)) or not isinstance(expected, (int, float)):
            return False
        return math.isclose(value, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return type(value) is type(expected) and value == expected


def _near(word: str, expected: str) -> bool:
    if not re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", expected) or expected.lstrip("+-").isdigit():
        return False
    try:
        return math.isclose(float(word), float(expected), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except ValueError:
        return False


def _one(given: Any, wanted: Any, name: str | None) -> ScriptTest | CallTest:
    if name is None:
        given, wanted = ("\n".join(text) if isinstance(text, list) and _texts(text) else text for text in (given, wanted))
        if not isinstance(given, str) or not isinstance(wanted, str):
            raise ValueError("metadata.tests: inputs and outputs are texts where no fn_name is given")
        return ScriptTest(given, wanted)
    if isinstance(given, str):  # LiveCodeBench: an argument a line, each as JSON
        given = [json.loads(line) for line in given.splitlines() if line.strip()]
        wanted = json.loads(wanted)
    return CallTest(name, list(given), wanted)


def _assertions(tests: str | list[str], metadata: Mapping[str, Any]) -> Assertions:
    code = tests if isinstance(tests, str) else "\n".join(tests)
    setup, entry = metadata.get("setup", ""), metadata.get("entry_point")
    code = f"{setup if isinstance(setup, str) else chr(10).join(setup)}\n{code}\n"
    if entry and re.search(r"^def check\(", code, re.MULTILINE):  # HumanEval's layout
        code += f"check({entry})\n"
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"metadata.tests: {error}") from None
    nodes = list(ast.walk(tree))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    made |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    made |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports = [alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    made |= {(alias.asname or alias.name).split(".")[0] for alias in imports}
    asked = {node.id for node in names} - made - set(dir(builtins)) - set(MODULES) | ({entry} if entry else set())
    if not asked:
        raise ValueError("metadata.tests: the assertions call nothing that the program could define")
    return Assertions(code, tuple(sorted(asked)))


def _texts(values: list) -> bool:
    return all(isinstance(value, str) for value in values)
