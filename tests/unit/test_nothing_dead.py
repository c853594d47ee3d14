"""Every function, method, class and constant of the package is used by the package, a tool, an example or the documentation."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "pmpo_megatron").rglob("*.py"))
USERS = [
    *(ROOT / "tools").rglob("*.py"),
    *(ROOT / "examples").rglob("*.py"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "pyproject.toml",
]
CALLED_BY_LIBRARIES = {
    "_postprocess",  # Megatron's GPTModel
    "forward",  # torch
    "backward",
    "get_replay_topk",  # Megatron's routers
    "pmpo_record_routes",  # vLLM's workers, by name
    "commit_tensor",  # torch.distributed.checkpoint
    "resolve_tensor",
    "elapsed_time",  # Megatron's timers
    "construct_mapping",  # PyYAML
    "repr_int",  # reprlib
}
FOR_TESTS = {"process_ids", "join_context_shards"}  # which processes to kill; the inverse of taking shards


def defined(tree):
    """Names of functions, classes and module constants that ``tree`` defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def unused(package, users):
    """Names that stand in ``package`` and ``users`` no more often than they are defined."""
    definitions, words = Counter(), Counter()
    for text in package:
        definitions.update(defined(ast.parse(text)))
    for text in (*package, *users):
        words.update(re.findall(r"\w+", text))
    return {name for name, count in definitions.items() if words[name] <= count and not name.startswith("__")}


def test_nothing_is_dead():
    found = unused([path.read_text() for path in PACKAGE], [path.read_text() for path in USERS])
    assert found <= CALLED_BY_LIBRARIES | FOR_TESTS, sorted(found - CALLED_BY_LIBRARIES - FOR_TESTS)


def test_what_is_dead_would_be_found():
    package = ["LIMIT = 3\nSPARE = 4\ndef run(): return LIMIT\nclass Part:\n    def close(self): ...\n"]
    assert unused(package, ["run(); Part()"]) == {"SPARE", "close"}
