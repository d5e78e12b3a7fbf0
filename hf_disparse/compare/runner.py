"""Runs the cells of a comparison: each cell is one pruning of a dense model that several cells share.

The folder holds the dense models and one file per finished cell. Starting the same comparison again runs only the cells
without a file.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_disparse.config import UserError, one_line
from hf_disparse.distributed.processes import is_main, on_main, processes, say
from hf_disparse.export.measurements import measure_speed
from hf_disparse.files import write_whole
from hf_disparse.model.loading import load_model
from hf_disparse.recipes.recipe import Recipe
from hf_disparse.runs.dense import expect_dense
from hf_disparse.runs.folder import PHASE_NAME, alone_in, check_data, claim, note_data, refuse_others
from hf_disparse.runs.setup import prepare, sizes
from hf_disparse.runs.train import rehearse, train_phase


def run_cells(recipe: Recipe, recipes: Mapping[Any, Recipe], folder: Path, rehearsed: Sequence[Any]) -> dict[str, str]:
    """Runs the cells without a result in `folder`, each from the dense model that is trained once per `start`.

    Args:
        recipe: the recipe of the comparison, whose output folder is claimed.
        recipes: cell -> its recipe; a cell has `name`, `start` and `seed`.
        rehearsed: the cells to rehearse before any cell runs; together they need whatever any cell needs.

    Returns:
        Name -> reason of each failed cell.
    """

    @on_main
    def unfinished() -> list[Any]:
        return [cell for cell in recipes if not cell_file(folder, cell).is_file()]

    todo = unfinished()
    failed = {}
    for start, cell in {cell.start: cell for cell in todo}.items():
        expect_dense(recipes[cell], folder / start)
    if todo:
        data_of = _DataBySeed(recipe)
        for cell in rehearsed:
            rehearse(recipes[cell], *data_of(recipes[cell]))
        claim(Path(recipe.output_dir), recipe)
        with alone_in(Path(recipe.output_dir)):
            refuse_others(Path(recipe.output_dir), recipe)  # another command may have claimed it since the first check
            todo = unfinished()
            failed = _run_all(recipes, folder, todo, data_of)
    for cell in set(recipes) - set(todo):  # killed after writing its result, before cleaning up
        shutil.rmtree(folder / "cells" / cell.name, ignore_errors=True)
    return failed


def _run_all(
    recipes: Mapping[Any, Recipe], folder: Path, todo: Sequence[Any], data_of: "_DataBySeed"
) -> dict[str, str]:
    """Runs cell by cell; returns name -> reason of each failed cell."""
    failed, hopeless = {}, {}
    for cell in tqdm(todo, desc="cells", disable=None if is_main() else True):
        say(f"cell {cell.name}, {len(todo)} to run, {len(recipes) - len(todo)} were there")
        try:
            if cell.start not in hopeless:
                _run(recipes[cell], cell, folder, data_of)
        except Exception as error:  # whatever it is, the other cells can still run
            if processes() > 1:  # the others may be anywhere in the cell, so all stop
                raise UserError(f"cell {cell.name} failed: {one_line(error)}") from error
            failed[cell.name] = one_line(error)
            say(f"cell {cell.name} failed: {failed[cell.name]}")
            if not Path(folder, cell.start, PHASE_NAME).is_file():
                hopeless[cell.start] = f"no dense model of seed {cell.seed}: {failed[cell.name]}"
        if cell.start in hopeless:
            failed[cell.name] = hopeless[cell.start]
    return failed


def cell_file(folder: Path, cell: Any) -> Path:
    """Returns the path of a finished cell's result."""
    return folder / "cells" / f"{cell.name}.json"


def _run(recipe: Recipe, cell: Any, root: Path, data_of: "_DataBySeed") -> None:
    """Trains one cell from its dense model, and that one first if it is missing."""
    tokenizer, data = data_of(recipe)
    data_of.note()
    dense = root / cell.start
    before = train_phase(recipe, "dense", dense, tokenizer, data)
    _remove_checkpoints(dense)
    work = root / "cells" / cell.name
    result = train_phase(recipe, "sparse", work, tokenizer, data, start=dense)
    result["pruned"] = result.pop("sparsity")  # as measured; the cell has the sparsity that was asked for
    result |= {"dense_backward_passes": before["backward_passes"], "examples": sizes(data)}
    result["speed"] = _speed(work, recipe.model.max_length)
    text = json.dumps({"cell": asdict(cell), **result}, indent=2) + "\n"
    on_main(write_whole)(cell_file(root, cell), text)
    on_main(shutil.rmtree)(work)  # a grid of models fills a disk; `train` makes any of them again


@on_main
def _speed(folder: Path, tokens: int) -> dict[str, Any]:
    return measure_speed(load_model(folder), tokens)


@on_main
def _remove_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


class _DataBySeed:
    """Gives the tokenized tasks of a cell; loads them anew when the seed changes, as it may choose the rows."""

    def __init__(self, recipe: Recipe):
        self._recipe, self._seed, self._loaded, self._digests = recipe, None, None, {}

    def note(self) -> None:
        """Records in the claimed folder the digests of the examples that were loaded last."""
        note_data(Path(self._recipe.output_dir), self._seed, self._digests)

    def __call__(self, recipe: Recipe):
        if self._seed != recipe.seed:
            ours = replace(self._recipe, seed=recipe.seed)
            tokenizer, data, _ = prepare(ours)
            self._digests = check_data(Path(ours.output_dir), ours, data)
            self._seed, self._loaded = recipe.seed, (tokenizer, data)
        tokenizer, data = self._loaded
        mine = {
            split: {name: rows for name, rows in tasks.items() if name in recipe.tasks} for split, tasks in data.items()
        }
        return tokenizer, mine


def progress(folder: str | Path, cells: Sequence[Any]) -> str:
    """Returns how many cells of a stopped comparison are done."""
    done = sum(cell_file(Path(folder), cell).is_file() for cell in cells)
    return f"{done} of {len(cells)} cells are done"
