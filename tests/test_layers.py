"""Imports point down: DESIGN's layers, walked from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_disparse"
LAYER = {
    "config": 0,
    "tasks": 1,
    "faults": 1,
    "parts": 2,
    "low_rank": 2,
    "adapters": 2,
    "unshared": 2,
    "architectures": 2,
    "shapes": 2,
    "model": 2,
    "scores": 3,
    "losses": 3,
    "decision": 4,
    "methods": 4,
    "distributed": 4,
    "sharded": 4,
    "masks": 5,
    "reconstruction": 5,
    "stored_scores": 5,
    "schedule": 6,
    "analysis": 7,
    "export": 7,
    "inference": 7,
    "trainer": 8,
    "family": 9,
    "recipes": 10,
    "recipe_training": 10,
    "recipe_yaml": 10,
    "pretrained": 10,
    "teachers": 10,
    "run": 10,
    "run_folder": 10,
    "cells": 10,
    "dense": 10,
    "compare": 10,
    "race": 10,
    "analyze": 10,
    "printing": 10,
    "cli": 10,
    "__main__": 10,
}
# Algorithms never import transformers; scores and decision know nothing of ours.
FORBIDDEN = {
    "config": {"torch", "transformers", "datasets"},
    "scores": {"transformers", "datasets", "hf_disparse"},
    "losses": {"transformers", "datasets", "hf_disparse"},
    "decision": {"transformers", "datasets", "hf_disparse"},
    "methods": {"transformers", "datasets"},
    "distributed": {"transformers", "datasets"},
    "sharded": {"transformers", "datasets"},
    "masks": {"transformers", "datasets"},
    "reconstruction": {"transformers", "datasets"},
    "stored_scores": {"transformers", "datasets"},
    "parts": {"transformers", "datasets", "hf_disparse"},
    "low_rank": {"transformers", "datasets"},
    "analysis": {"transformers", "datasets"},
    "schedule": {"transformers", "datasets", "torch"},
}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "hf_disparse"
                else [node.module]
            )
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_points_up(path):
    assert top(path) in LAYER, f"give {top(path)} a layer"
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in FORBIDDEN.get(top(path), set()), f"{top(path)} imports {name}"
        if parts[0] == "hf_disparse" and len(parts) > 1:
            assert LAYER[parts[1]] <= LAYER[top(path)], f"{top(path)} imports {name}"
