"""Imports point down: each wing imports only wings below it, and no wing has a circle inside."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_disparse"
# From the top to the bottom. `__init__` and `__main__` are the doors of the house, above all.
WINGS = (
    "cli",
    "compare",
    "runs",
    "recipes",
    "trainer",
    "speed",
    "export",
    "methods",
    "analysis",
    "model",
    "fast",
    "tasks",
    "pruning",
    "report",
    "distributed",
    "files",
    "config",
)
# Libraries that a wing may do without: algorithms know nothing of transformers, configs nothing of torch.
FORBIDDEN = {
    "config": {"torch", "transformers", "datasets"},
    "files": {"transformers", "datasets"},
    "distributed": {"transformers", "datasets"},
    "report": {"torch", "transformers", "datasets"},
    "pruning": {"transformers", "datasets", "accelerate"},
    "analysis": {"transformers", "datasets", "accelerate"},
    "methods": {"transformers", "datasets", "accelerate"},
}
# The heart knows torch alone.
ALONE = {"pruning/scores.py", "pruning/decision.py", "pruning/parts.py", "trainer/losses.py"}

MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem == "files"]


def wing(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> set[str]:
    """The modules that a module imports, at its top or later: of ours the whole name, of others the library."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in NAMES else node.module for name in names]
        else:
            continue
        found.update(name if name.split(".")[0] == "hf_disparse" else name.split(".")[0] for name in names)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_its_own_wing_and_wings_below(path):
    place = WINGS.index(wing(path))
    assert "hf_disparse" not in imports(path), "the whole package, from within"
    for name in imports(path):
        library, _, inner = name.partition(".")
        assert library not in FORBIDDEN.get(wing(path), ()), name
        if library == "hf_disparse":
            assert str(path.relative_to(PACKAGE)) not in ALONE, name
            assert WINGS.index(inner.split(".")[0]) >= place, name


def test_no_wing_has_a_circle_inside():
    graph = {name_of(path): {name for name in imports(path) if name in NAMES} for path in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_wing_is_in_the_list_and_says_what_it_is():
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if not path.name.startswith(("_", "py.typed"))}
    assert found == set(WINGS)
    for name in WINGS:
        path = PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name
