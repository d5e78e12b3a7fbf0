"""Whose an output folder is, and files that are written whole or not at all. Layer 10.

Of several processes the main one reads and writes here, and tells the others what it found.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from hf_disparse.config import UserError, one_line
from hf_disparse.distributed import from_main
from hf_disparse.faults import writing
from hf_disparse.recipe_yaml import dump_yaml, parse_yaml
from hf_disparse.recipes import Recipe

RECIPE_NAME = "recipe.yaml"
PHASE_NAME = "phase.json"  # in the folder of a finished phase


def refuse_others(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder that holds another run or something else, and changes nothing."""
    from_main(lambda: _refuse_others(folder, recipe))


def _refuse_others(folder: Path, recipe: Recipe) -> None:
    path = folder / RECIPE_NAME
    try:
        theirs = parse_yaml(path.read_text(encoding="utf-8")) if path.is_file() else None
        others = theirs is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"output_dir: cannot read {folder}: {one_line(error)}") from error
    if others or not isinstance(theirs, dict | None):
        raise UserError(
            f"output_dir: expected a new or empty folder, or one of this run, got {folder}, which holds something else.\n"
            "Give this run its own --output_dir."
        )
    mine = recipe.values
    # A run may be moved and go on elsewhere: where it is does not make it another one.
    keys = sorted(k for k in {*(theirs or mine), *mine} - {"output_dir"} if (theirs or mine).get(k) != mine.get(k))
    if keys:
        raise UserError(
            f"output_dir: {folder} holds another run, which differs in {', '.join(keys)}.\n"
            "Give this one its own --output_dir, or delete that folder to start over."
        )


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


def find_json(path: Path) -> dict[str, Any] | None:
    """What `write_whole` wrote there, None if it did not yet; the same answer for all processes."""
    return from_main(lambda: read_json(path) if path.is_file() else None)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_whole` wrote there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"output_dir: expected JSON in {path}, got a file that does not parse: {one_line(error)}.\n"
            "Delete that file, and the same command makes it again."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also where the machine loses power; of several processes in one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
