"""`hf-disparse compare`: pruning methods on one recipe in one table, each at the same number of backward passes. Layer 10.

The folder holds one dense model per seed, which every method starts from, and one file per finished cell of the grid, a
cell being a method, a criterion, a sparsity and a seed. Starting the same comparison again runs what is not there yet.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm.auto import tqdm

from hf_disparse.compare.by_method import METHODS, Cell, recipe_of
from hf_disparse.config import UserError, one_line
from hf_disparse.distributed.processes import from_main, is_main, processes
from hf_disparse.files import writing
from hf_disparse.recipes.recipe import Recipe
from hf_disparse.report.values import method_name
from hf_disparse.report.write import missing_libraries, write_comparison
from hf_disparse.runs.dense import expect_dense
from hf_disparse.runs.folder import (
    PHASE_NAME,
    alone_in,
    check_data,
    claim,
    note_data,
    read_json,
    refuse_others,
    write_whole,
)
from hf_disparse.runs.train import environment, prepare, rehearse, say, sizes, train_phase
from hf_disparse.tasks import average, average_name

JSON_NAME, MARKDOWN_NAME = "compare.json", "compare.md"


def compare(recipe: Recipe, cells: Sequence[Cell]) -> dict[str, Any]:
    """Runs the cells that are not there yet and tabulates all of them; writes `compare.json` and `compare.md`, and with
    matplotlib `compare.html` and its figure.

    A cell that fails is reported and leaves the others alone; the next call tries it again. With several processes it ends all.

    Returns:
        What `compare.json` holds: `rows` (one per method, criterion and sparsity, over the seeds) and `cells`, of all that
        the folder has, `failed` (cell -> reason, of this call) and `environment`.
    """
    folder = Path(recipe.output_dir)
    refuse_others(folder, recipe)
    recipes = {cell: recipe_of(recipe, cell) for cell in cells}  # refuses nonsense before anything runs
    _finished(folder)  # and so does a file that is none of a cell
    sparsest = {}  # of each method and granularity
    for cell in sorted(cells, key=lambda cell: (cell.sparsity, cell.criterion)):
        sparsest[recipes[cell].pruning.method, recipes[cell].pruning.granularity] = cell
    failed = run_cells(recipe, recipes, folder, list(sparsest.values()))
    results = _finished(folder)
    report = {
        "rows": tabulate(results),
        "cells": [{**asdict(cell), **result} for cell, result in results.items()],
        "failed": failed,
        "environment": environment(),
    }
    if results:
        from_main(lambda: _write(report, folder))
    return report


def _write(report: dict[str, Any], folder: Path) -> None:
    write_tables(report, folder, JSON_NAME, MARKDOWN_NAME, markdown(report))
    if not missing_libraries():  # of the extra `plot`
        with writing(folder):
            write_comparison(report, folder)


def write_tables(report: dict[str, Any], folder: Path, json_name: str, markdown_name: str, text: str) -> None:
    """Writes a report as JSON, and its text beside it."""
    with writing(folder):
        write_whole(folder / json_name, json.dumps(report, indent=2) + "\n")
        write_whole(folder / markdown_name, text)


def run_cells(recipe: Recipe, recipes: Mapping[Any, Recipe], folder: Path, rehearsed: Sequence[Any]) -> dict[str, str]:
    """Runs the cells that `folder` does not have yet, each from the dense model that is trained once for its `start`.

    Args:
        recipe: that of all; its folder is claimed.
        recipes: cell -> its recipe; a cell has `name`, `start` and `seed`.
        rehearsed: the cells that are tried before any of them runs: together they ask for whatever any cell does.

    Returns:
        Name -> reason, of the cells that failed.
    """

    def unfinished() -> list[Any]:
        return from_main(lambda: [cell for cell in recipes if not cell_file(folder, cell).is_file()])

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
            refuse_others(Path(recipe.output_dir), recipe)  # another command may have been at work here meanwhile
            todo = unfinished()
            failed = _run_all(recipes, folder, todo, data_of)
    for cell in set(recipes) - set(todo):  # killed between its result and the end of its clean-up
        shutil.rmtree(folder / "cells" / cell.name, ignore_errors=True)
    return failed


def _run_all(
    recipes: Mapping[Any, Recipe], folder: Path, todo: Sequence[Any], data_of: "_DataBySeed"
) -> dict[str, str]:
    """Runs cell by cell; name -> reason, of those that failed."""
    failed, hopeless = {}, {}
    for cell in tqdm(todo, desc="cells", disable=None if is_main() else True):
        say(f"cell {cell.name}, {len(todo)} to run, {len(recipes) - len(todo)} were there")
        try:
            if cell.start not in hopeless:
                _run(recipes[cell], cell, folder, data_of)
        except Exception as error:  # whatever it is, the other cells are not to blame
            if processes() > 1:  # the others may be anywhere in the cell: the next command goes on together
                raise UserError(f"cell {cell.name} failed: {one_line(error)}") from error
            failed[cell.name] = one_line(error)
            say(f"cell {cell.name} failed: {failed[cell.name]}")
            if not Path(folder, cell.start, PHASE_NAME).is_file():
                hopeless[cell.start] = f"no dense model of seed {cell.seed}: {failed[cell.name]}"
        if cell.start in hopeless:
            failed[cell.name] = hopeless[cell.start]
    return failed


def cell_file(folder: Path, cell: Any) -> Path:
    """Where a finished cell's result is."""
    return folder / "cells" / f"{cell.name}.json"


def _finished(folder: Path) -> dict[Cell, dict[str, Any]]:
    """The results of all cells in the folder, whichever command ran them, in the order of a table."""
    results = {}
    for path in folder.glob("cells/*.json"):
        result = read_json(path)
        try:
            results[Cell(**result.pop("cell"))] = result
        except (KeyError, TypeError):
            raise UserError(
                f"output_dir: expected a cell of this comparison in {path}, got something else.\nDelete it."
            ) from None
    place = {method: i for i, method in enumerate(METHODS)}  # another quorum than 2 comes last

    def order(cell: Cell) -> tuple:
        return cell.sparsity, place.get(cell.method, len(place)), cell.method, cell.criterion, cell.seed

    return {cell: results[cell] for cell in sorted(results, key=order)}


def _run(recipe: Recipe, cell: Any, root: Path, data_of: "_DataBySeed") -> None:
    """Trains one cell from its dense model, which is trained first if it is not there."""
    tokenizer, data = data_of(recipe)
    data_of.note()
    dense = root / cell.start
    before = train_phase(recipe, "dense", dense, tokenizer, data)
    from_main(lambda: [shutil.rmtree(path) for path in dense.glob("checkpoint-*")])
    work = root / "cells" / cell.name
    result = train_phase(recipe, "sparse", work, tokenizer, data, start=dense)
    result["pruned"] = result.pop("sparsity")  # as measured; the cell has the sparsity that was asked for
    result |= {"dense_backward_passes": before["backward_passes"], "examples": sizes(data)}
    text = json.dumps({"cell": asdict(cell), **result}, indent=2) + "\n"
    from_main(lambda: write_whole(cell_file(root, cell), text))
    from_main(lambda: shutil.rmtree(work))  # a grid of models fills a disk; `train` makes any one of them again


class _DataBySeed:
    """Loads and tokenizes all tasks when the seed changes, for it may choose which rows are taken; gives those of a cell."""

    def __init__(self, recipe: Recipe):
        self._recipe, self._seed, self._loaded, self._digests = recipe, None, None, {}

    def note(self) -> None:
        """Notes in the claimed folder which examples were loaded last."""
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


def tabulate(results: dict[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method, criterion and sparsity: mean and sample standard deviation over its seeds.

    A task's value is the mean of its metrics, as in GLUE's average. `against_dense` is the mean over seeds of the
    average's difference from the dense row of the same seed.
    """
    dense = {cell.seed: result["metrics"]["average"] for cell, result in results.items() if cell.method == "dense"}
    groups: dict[tuple, list[Cell]] = {}
    for cell in results:
        groups.setdefault((cell.method, cell.criterion, cell.sparsity), []).append(cell)
    rows = []
    for (method, criterion, sparsity), cells in groups.items():
        metrics = [results[cell]["metrics"] for cell in cells]
        paired = [m["average"] - dense[cell.seed] for cell, m in zip(cells, metrics, strict=True) if cell.seed in dense]
        seconds = [sum(results[cell]["seconds"].values()) for cell in cells]
        rows.append(
            {
                "method": method,
                "criterion": criterion,
                "sparsity": sparsity,
                "seeds": [cell.seed for cell in cells],
                **over_seeds(metrics),
                "against_dense": mean(paired) if paired else None,
                "backward_passes": max(results[cell]["backward_passes"] for cell in cells),
                "seconds": mean(seconds),
            }
        )
    return rows


def over_seeds(metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """`mean` and `spread`, the sample standard deviation, of each task and of `average`; one seed has no spread."""
    values = {"average": [m["average"] for m in metrics]}
    values |= {task: [average({task: m["tasks"][task]}) for m in metrics] for task in metrics[0]["tasks"]}
    return {
        "mean": {name: mean(v) for name, v in values.items()},
        "spread": {name: stdev(v) if len(v) > 1 else None for name, v in values.items()},
    }


def shown(row: dict[str, Any], name: str) -> str:
    """`a ± b` of a task or the average in a row of `over_seeds`."""
    spread = row["spread"][name]
    return f"{row['mean'][name]:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first column is text."""
    aligned = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, aligned, *rows)]


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, for the terminal and for Markdown; `a ± b` is mean and standard deviation over seeds."""
    tasks = [name for name in report["rows"][0]["mean"] if name != "average"]
    lines = []
    for row in report["rows"]:
        values = [shown(row, name) for name in (*tasks, "average")]
        sparsity = f"{100 * row['sparsity']:g} %" if row["sparsity"] else "0"
        difference = f"{row['against_dense']:+.1f}" if row["sparsity"] and row["against_dense"] is not None else ""
        lines.append([method_name(row), sparsity, *values, difference, str(len(row["seeds"]))])
    return ["method", "sparsity", *tasks, average_name(tasks), "against dense", "seeds"], lines


def held_out(report: dict[str, Any]) -> str:
    """How many examples each task is measured on: a range where seeds hold out other ones by `validation_fraction`."""
    sizes: dict[str, list[int]] = {}
    for cell in report["cells"]:
        for task, size in cell["examples"]["validation"].items():
            sizes.setdefault(task, []).append(size)
    return ", ".join(f"{task} {_span(found)}" for task, found in sizes.items())


def _span(numbers: Sequence[int]) -> str:
    """The number that all of them are, or from which to which they go."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def caption(report: dict[str, Any]) -> str:
    """What the figures of the table are."""
    budget = _span([row["backward_passes"] for row in report["rows"]])
    precisions = sorted({cell.get("precision") for cell in report["cells"]} - {None})  # None: of an earlier version
    computed = f" Computed in {' and '.join(precisions)}." if precisions else ""
    return (
        f"Mean ± sample standard deviation over seeds of each task's metrics (0 to 100), on {held_out(report)} held-out examples. "
        f"Every row had {budget} backward passes after dense training, scoring included.{computed}"
    )


def markdown(report: dict[str, Any], table: Callable = table, caption: Callable = caption) -> str:
    """The table, its caption and what failed, as Markdown; the first two as another protocol's report has them."""
    lines = [*markdown_table(*table(report)), "", caption(report), ""] if report["rows"] else []
    failed = [f"Failed: {name}: {reason}\n" for name, reason in report["failed"].items()]
    return "\n".join([*lines, *failed]).rstrip() + "\n"


def progress(folder: str | Path, cells: Sequence[Any]) -> str:
    """How far a comparison is, for somebody who stopped it."""
    done = sum(cell_file(Path(folder), cell).is_file() for cell in cells)
    return f"{done} of {len(cells)} cells are done"
