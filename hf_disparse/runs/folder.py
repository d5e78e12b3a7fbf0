"""Whose an output folder is, and files that are written whole or not at all. Layer 10.

Of several processes the main one reads and writes here, and tells the others what it found.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from filelock import FileLock, Timeout

from hf_disparse.config import UserError, one_line
from hf_disparse.distributed.processes import from_main
from hf_disparse.files import _PART, write_whole, writing
from hf_disparse.recipes.recipe import Recipe
from hf_disparse.recipes.yaml_text import differing, dump_yaml, parse_yaml

RECIPE_NAME = "recipe.yaml"
PHASE_NAME = "phase.json"  # in the folder of a finished phase
DATA_NAME = "data.json"  # seed -> split/task -> SHA-256 of its examples
LOCK_NAME = ".lock"
PATIENCE = 10  # seconds; data workers of a run that was killed hold its lock for some


def refuse_others(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder that holds another run or something else, and changes nothing."""
    from_main(lambda: _refuse_others(folder, recipe))


def _refuse_others(folder: Path, recipe: Recipe) -> None:
    path = folder / RECIPE_NAME
    try:
        theirs = parse_yaml(path.read_text(encoding="utf-8")) if path.is_file() else None
        others = theirs is None and folder.exists() and (not folder.is_dir() or _holds_others(folder))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"output_dir: cannot read {folder}: {one_line(error)}") from error
    if others or not isinstance(theirs, dict | None):
        raise UserError(
            f"output_dir: expected a new or empty folder, or one of this run, got {folder}, which holds something else.\n"
            "Give this run its own --output_dir."
        )
    mine = recipe.values
    # A run may be moved and go on elsewhere: where it is does not make it another one.
    theirs = theirs or mine
    if keys := differing({**theirs, "output_dir": None}, {**mine, "output_dir": None}):
        raise UserError(
            f"output_dir: {folder} holds another run, which differs in {', '.join(keys)}.\n"
            "Give this one its own --output_dir, or delete that folder to start over."
        )


def _holds_others(folder: Path) -> bool:
    """Whether there is more than the recipe of a run that died while it wrote that."""
    return any(path.name != RECIPE_NAME + _PART for path in folder.iterdir())


def claim(folder: Path, recipe: Recipe) -> None:
    """Marks the folder as this recipe's."""
    from_main(lambda: _claim(folder, recipe))
    if not (folder / RECIPE_NAME).is_file():
        raise UserError(f"output_dir: expected a folder that all machines share, got {folder}, which this one lacks")


def _claim(folder: Path, recipe: Recipe) -> None:
    with writing(folder, "Mend that or name another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RECIPE_NAME).is_file():
            write_whole(folder / RECIPE_NAME, dump_yaml(recipe.values))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other commands from writing to a claimed folder meanwhile: they would take away what this one stands on."""
    lock = FileLock(folder / LOCK_NAME, timeout=PATIENCE)
    from_main(lambda: _lock(lock, folder))
    try:
        yield
    finally:
        lock.release()


def _lock(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"output_dir: expected a folder to work in alone, got {folder}, where another command is at work.\n"
            "Wait for it, or give this run its own --output_dir."
        ) from None
    except (NotImplementedError, OSError):
        pass  # a file system without locks; where nothing can be written, writing will say so


def check_data(folder: Path, recipe: Recipe, data: dict[str, dict[str, Dataset]]) -> dict[str, str]:
    """Refuses other examples than those that the folder, or that of `dense_from`, began with for this seed; changes nothing.

    Args:
        data: split -> task -> tokenized rows.

    Returns:
        What `note_data` notes of them: split/task -> digest.
    """
    return from_main(lambda: _check_data(folder, recipe, data))


def _check_data(folder: Path, recipe: Recipe, data: dict[str, dict[str, Dataset]]) -> dict[str, str]:
    digests = {f"{split}/{task}": _digest(rows) for split, tasks in data.items() for task, rows in tasks.items()}
    for place in (folder, Path(recipe.dense_from).expanduser()) if recipe.dense_from else (folder,):
        known = _noted(place).get(str(recipe.seed), {})
        for name, digest in digests.items():
            if known.get(name, digest) != digest:
                split, _, task = name.partition("/")
                remedy = "Give this run its own --output_dir." if place == folder else "Leave dense_from away."
                raise UserError(
                    f"tasks.{task}: expected the {split} examples that {place} began with, got others: the data, how it is "
                    f"read or the tokenizer has changed.\n{remedy}"
                )
    return digests


def note_data(folder: Path, seed: int, digests: dict[str, str]) -> None:
    """Notes in a claimed folder what was begun with."""
    from_main(lambda: _note_data(folder, str(seed), digests))


def _note_data(folder: Path, seed: str, digests: dict[str, str]) -> None:
    noted = _noted(folder)
    if not noted.get(seed, {}).keys() >= digests.keys():
        noted[seed] = noted.get(seed, {}) | digests
        with writing(folder):
            write_whole(folder / DATA_NAME, json.dumps(noted, indent=2) + "\n")


def _noted(folder: Path) -> dict[str, Any]:
    return read_json(folder / DATA_NAME) if (folder / DATA_NAME).is_file() else {}


def _digest(rows: Dataset) -> str:
    """SHA-256 of what a task's examples say, token by token, whatever file and form they came in."""
    digest = hashlib.sha256()
    for batch in rows.with_format(None).select_columns(["input_ids", "labels"]).iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def find_json(path: Path) -> dict[str, Any] | None:
    """What `write_whole` wrote there, None if it did not yet; the same answer for all processes."""
    return from_main(lambda: read_json(path) if path.is_file() else None)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_whole` wrote there."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {values!r:.40}")
    except ValueError as error:
        raise UserError(
            f"output_dir: expected a JSON object in {path}, got a file that is none: {one_line(error)}.\n"
            "Delete that file, and the same command makes it again."
        ) from error
    return values
