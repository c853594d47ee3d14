"""The package's layers: left never imports right. Keeps the pure parts pure and the program readable in one order."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pmpo_megatron"
LAYERS = [
    {"errors", "units"},
    {"types", "yaml_values"},
    {"config"},
    {"algo"},
    {"data", "rewards"},
    {"parallel"},
    {"hf"},
    {"model"},
    {"checkpoint"},
    {"convert"},
    {"rollout"},
    {"bridge"},
    {"monitor"},
    {"benchmarks", "training"},
    {"planner"},
    {"commands"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imported_modules(path: Path) -> set[str]:
    """Second component of every ``pmpo_megatron.X`` that ``path`` imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            names |= {node.module} if node.module != "pmpo_megatron" else {f"pmpo_megatron.{a.name}" for a in node.names}
    return {name.split(".")[1] for name in names if name.startswith("pmpo_megatron.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_left_never_imports_right(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in RANK, f"{part} has no place in the import order: give it one in {__file__}"
    later = {name for name in imported_modules(path) if RANK.get(name, -1) > RANK[part]}
    assert not later, f"{path} imports {sorted(later)}, which come later in the import order"


def test_few_rooms():
    rooms = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"]
    rooms.remove(PACKAGE / "__init__.py")
    assert len(rooms) <= 20, sorted(path.name for path in rooms)


def modules_imported(path: Path) -> set[str]:
    """Modules of the package that ``path`` imports, also inside functions and for type checking alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_module_imports_itself_through_others():
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    graph = {name: modules_imported(path) & set(names.values()) - {name} for path, name in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_algo_is_pure_torch():
    for path in (PACKAGE / "algo").glob("*.py"):
        text = path.read_text()
        assert "megatron.core" not in text and "torch.distributed" not in text, path


def test_only_parallel_uses_megatrons_parallel_state():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "parallel":
            assert "parallel_state" not in path.read_text(), f"{path}: ask ParallelState instead"
