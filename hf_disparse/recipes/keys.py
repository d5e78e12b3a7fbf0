"""The keys of a recipe, checked without importing torch or transformers, so that a mistyped one is answered at once."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_disparse.config import UserError, closest, require

SECTIONS = (
    "model",
    "tasks",
    "helpers",
    "teachers",
    "pruning",
    "training",
    "recovery",
    "seed",
    "output_dir",
    "dense_from",
)


def check_sections(values: dict[str, Any]) -> None:
    """Refuses unknown or missing sections, and keys that are not one line of text."""
    _check_text(values, "recipe", depth=3)  # down to the fields of a task
    for key in values:
        if key not in SECTIONS:
            raise UserError(f"recipe: there is no section '{key}'{closest(key, SECTIONS)}")
    for key in ("model", "tasks", "output_dir"):
        if values.get(key) is None:
            raise UserError(f"recipe: the section '{key}' is required and was not given")


def _check_text(values: dict, where: str, depth: int) -> None:
    for key, inner in values.items():
        require(isinstance(key, str) and key.isprintable(), where, "plain text as every key", key)
        if depth > 1 and isinstance(inner, dict):
            _check_text(inner, key if where == "recipe" else f"{where}.{key}", depth - 1)


def check_training_keys(values: dict[str, Any], where: str) -> None:
    """Refuses unknown training fields, and those that a recipe must not set."""
    for key in values:
        if key in ("output_dir", "seed"):
            raise UserError(f"{where}.{key}: set '{key}' at the top of the recipe")
        if key.startswith("hub_") or key == "push_to_hub":  # `hub_token` would be published with the recipe
            raise UserError(f"{where}.{key}: a recipe does not push; `hf-disparse push` uploads the finished run")
        if key.endswith("_full_eval"):  # Trainer leaves the model in that precision, to be saved and trained on
            raise UserError(f"{where}.{key}: a recipe evaluates in the precision of training; set bf16: true for both")
        if key in ("prediction_loss_only", "label_names"):
            raise UserError(f"{where}.{key}: a recipe measures every task by its labels; leave it out")
        if key not in training_fields():
            known = sorted(training_fields() - {"output_dir", "seed"})
            raise UserError(f"{where}.{key}: TrainingArguments has no such field{closest(key, known)}")


@cache
def training_fields() -> frozenset[str]:
    """Returns the fields of DisparseTrainingArguments, read from the source files, as importing them takes seconds."""
    transformers = Path(find_spec("transformers").submodule_search_locations[0])
    sources = {
        "TrainingArguments": transformers / "training_args.py",
        "DisparseTrainingArguments": Path(__file__).parents[1] / "trainer" / "arguments.py",
    }
    names = set()
    for name, path in sources.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                names |= {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
    return frozenset(names)
