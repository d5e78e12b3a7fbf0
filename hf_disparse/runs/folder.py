"""Who owns an output folder: the recipe, the data digests and the lock in it.

The main process reads and writes here, and every process gets what it found.
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

from hf_disparse.config import UserError, one_line, without_ignored
from hf_disparse.distributed.processes import on_main
from hf_disparse.files import PART, read_json, write_whole, writing
from hf_disparse.recipes.recipe import Recipe
from hf_disparse.recipes.yaml_text import differing_settings, dump_yaml, parse_yaml

RECIPE_NAME = "recipe.yaml"
PHASE_NAME = "phase.json"  # in the folder of a finished phase
DATA_NAME = "data.json"  # seed -> split/task -> SHA-256 of its examples
LOCK_NAME = ".lock"
PATIENCE = 10  # seconds; the data workers of a killed run hold its lock for a few
DELETE = "Delete that file and run the same command again."


@on_main
def refuse_others(folder: Path, recipe: Recipe) -> None:
    """Raises UserError if the folder holds another run or other files; changes nothing."""
    path = folder / RECIPE_NAME
    try:
        theirs = parse_yaml(path.read_text(encoding="utf-8")) if path.is_file() else None
        others = theirs is None and folder.exists() and (not folder.is_dir() or _holds_others(folder))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"output_dir: cannot read {folder}: {one_line(error)}") from error
    if others or not isinstance(theirs, dict | None):
        raise UserError(
            f"output_dir: expected a new or empty folder, or one of this run, but {folder} holds something else.\n"
            "Give this run its own `output_dir`."
        )
    mine = recipe.values
    theirs = theirs or mine
    if keys := differing_settings(_comparable(theirs), _comparable(mine)):
        raise UserError(
            f"output_dir: {folder} holds another run, which differs in {', '.join(keys)}.\n"
            "Give this one its own `output_dir`, or delete that folder to start over."
        )


def _comparable(values: dict) -> dict:
    """Returns a recipe without what does not make it another run: its folder, which may move, and settings without effect."""
    return {**values, "output_dir": None, "pruning": without_ignored(values.get("pruning"))}


def _holds_others(folder: Path) -> bool:
    """Whether the folder holds more than the half-written recipe of a run that was killed."""
    return any(path.name != RECIPE_NAME + PART for path in folder.iterdir())


def claim(folder: Path, recipe: Recipe) -> None:
    """Marks the folder as this recipe's."""
    _write_recipe(folder, recipe)
    if not (folder / RECIPE_NAME).is_file():
        raise UserError(f"output_dir: expected a folder that all machines share, but {folder} is missing on this one")


@on_main
def _write_recipe(folder: Path, recipe: Recipe) -> None:
    with writing(folder, "Fix this or choose another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RECIPE_NAME).is_file():
            write_whole(folder / RECIPE_NAME, dump_yaml(recipe.values))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Locks a claimed folder, so that no other command removes files that this one needs."""
    lock = FileLock(folder / LOCK_NAME, timeout=PATIENCE)
    _acquire(lock, folder)
    try:
        yield
    finally:
        lock.release()


@on_main
def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"output_dir: {folder} is in use by another hf-disparse command.\n"
            "Wait for it to end, or give this run its own `output_dir`."
        ) from None
    except (NotImplementedError, OSError):
        pass  # a file system without locks; if the folder cannot be written to, the first write says so


@on_main
def check_data(folder: Path, recipe: Recipe, data: dict[str, dict[str, Dataset]]) -> dict[str, str]:
    """Raises UserError if the examples differ from those the folder, or `dense_from`, started with; changes nothing.

    Args:
        data: split -> task -> tokenized rows.

    Returns:
        split/task -> digest, for `note_data`.
    """
    digests = {f"{split}/{task}": _digest(rows) for split, tasks in data.items() for task, rows in tasks.items()}
    for place in (folder, Path(recipe.dense_from).expanduser()) if recipe.dense_from else (folder,):
        known = _noted(place).get(str(recipe.seed), {})
        for name, digest in digests.items():
            if known.get(name, digest) != digest:
                split, _, task = name.partition("/")
                remedy = "Give this run its own `output_dir`." if place == folder else "Remove dense_from."
                raise UserError(
                    f"tasks.{task}: the {split} examples differ from those that {place} started with: the data, how it is "
                    f"read, or the tokenizer has changed.\n{remedy}"
                )
    return digests


@on_main
def note_data(folder: Path, seed: int, digests: dict[str, str]) -> None:
    """Records in a claimed folder the data digests that this seed started with."""
    noted, seed = _noted(folder), str(seed)
    if not noted.get(seed, {}).keys() >= digests.keys():
        noted[seed] = noted.get(seed, {}) | digests
        with writing(folder):
            write_whole(folder / DATA_NAME, json.dumps(noted, indent=2) + "\n")


def _noted(folder: Path) -> dict[str, Any]:
    return read_json(folder / DATA_NAME, DELETE) if (folder / DATA_NAME).is_file() else {}


def _digest(rows: Dataset) -> str:
    """Returns the SHA-256 of a task's tokens and labels, which does not depend on the file or format they came in."""
    digest = hashlib.sha256()
    for batch in rows.with_format(None).select_columns(["input_ids", "labels"]).iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


@on_main
def find_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file of a run, or None if there is no such file yet."""
    return read_json(path, DELETE) if path.is_file() else None
