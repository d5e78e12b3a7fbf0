"""`hf-disparse compare`: pruning methods on one recipe in one table, each at the same number of backward passes. Layer 10.

The folder holds one dense model per seed, which every method starts from, and one file per finished cell of the grid, a
cell being a method, a criterion, a sparsity and a seed. Starting the same comparison again runs what is not there yet.
"""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm.auto import tqdm

from hf_disparse.config import CRITERIA, UserError, closest, one_line, require
from hf_disparse.recipes import Recipe, parse_recipe
from hf_disparse.run import PHASE_NAME, environment, prepare, rehearse, say, sizes, train_phase
from hf_disparse.run_folder import claim, read_json, refuse_others, write_whole
from hf_disparse.schedule import update_steps
from hf_disparse.scores import GRADIENT_CRITERIA
from hf_disparse.tasks import average

JSON_NAME, MARKDOWN_NAME = "compare.json", "compare.md"
METHODS = ("dense", "random", "magnitude", "joint", "sum", "max", "mean", "quorum2", "unanimous")
_WITHOUT_CRITERION = ("dense", "random", "magnitude")  # every task would say the same, and none needs a gradient


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        method: one of METHODS, or `quorum` with another number.
        criterion: of the methods that leave it open; empty for the others.
        sparsity: 0 for the dense row.
    """

    method: str
    criterion: str
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        parts = [self.method, self.criterion, str(self.sparsity) if self.sparsity else "", f"seed{self.seed}"]
        return "-".join(part for part in parts if part)

    @property
    def scores_by_gradients(self) -> bool:
        """Whether its scoring takes backward passes."""
        return self.method not in _WITHOUT_CRITERION and self.criterion in GRADIENT_CRITERIA

    def pruning(self) -> dict[str, Any]:
        """The fields of PruningConfig that this cell sets."""
        quorum = int(self.method.removeprefix("quorum")) if self.method.startswith("quorum") else 1
        decisions = {"joint": "joint", "sum": "sum", "max": "max", "mean": "mean_rank"}
        fields = {
            "sparsity": self.sparsity,
            "decision": decisions.get(self.method, "quorum" if quorum > 1 else "unanimous"),
            "quorum": quorum,
        }
        criterion = self.method if self.method in ("random", "magnitude") else self.criterion
        return {**fields, "criterion": criterion} if criterion else fields


def grid(
    methods: Sequence[str], criteria: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """The cells of a comparison, one seed after the other; methods without a criterion stand once for all criteria."""
    for method in methods:
        if method not in METHODS and not re.fullmatch(r"quorum[1-9]\d*", method):
            raise UserError(f"--methods: unknown method {method!r}{closest(method, METHODS)}")
    for criterion in criteria:
        if criterion not in CRITERIA:
            raise UserError(f"--criteria: unknown criterion {criterion!r}{closest(criterion, CRITERIA)}")
    for sparsity in sparsities:
        require(0 < sparsity < 1, "--sparsities", "numbers in (0, 1); the method dense is the one without", sparsity)
    cells = [
        Cell(method, "" if method in _WITHOUT_CRITERION else criterion, 0.0 if method == "dense" else sparsity, seed)
        for seed in seeds
        for sparsity in sparsities
        for method in methods
        for criterion in criteria
    ]
    return list(dict.fromkeys(cells))


def compare(recipe: Recipe, cells: Sequence[Cell]) -> dict[str, Any]:
    """Runs the cells that are not there yet and tabulates all of them; writes `compare.json` and `compare.md`.

    A cell that fails is reported and leaves the others alone; the next call tries it again.

    Returns:
        What `compare.json` holds: `rows` (one per method, criterion and sparsity, over the seeds) and `cells`, of all that
        the folder has, `failed` (cell -> reason, of this call) and `environment`.
    """
    folder = Path(recipe.output_dir)
    refuse_others(folder, recipe)
    recipes = {cell: _recipe_of(recipe, cell) for cell in cells}  # refuses nonsense before anything runs
    todo = [cell for cell in cells if not _file(folder, cell).is_file()]
    failed, hopeless = {}, {}
    if todo:
        data_of = _DataBySeed()
        most = max(todo, key=lambda cell: (cell.sparsity > 0, cell.scores_by_gradients))  # asks for what others do not
        rehearse(recipes[most], *data_of(recipes[most]))
        claim(folder, recipe)
    for cell in tqdm(todo, desc="cells", disable=None):
        say(f"cell {cell.name}, {len(todo)} to run, {len(cells) - len(todo)} were there")
        try:
            if cell.seed not in hopeless:
                _run(recipes[cell], cell, folder, data_of)
        except Exception as error:  # whatever it is, the other cells are not to blame
            failed[cell.name] = one_line(error)
            say(f"cell {cell.name} failed: {failed[cell.name]}")
            if not Path(_dense(folder, cell), PHASE_NAME).is_file():
                hopeless[cell.seed] = f"no dense model of seed {cell.seed}: {failed[cell.name]}"
        if cell.seed in hopeless:
            failed[cell.name] = hopeless[cell.seed]
    for cell in set(cells) - set(todo):  # killed between its result and the end of its clean-up
        shutil.rmtree(folder / "cells" / cell.name, ignore_errors=True)
    results = _finished(folder)
    report = {
        "rows": tabulate(results),
        "cells": [{**asdict(cell), **result} for cell, result in results.items()],
        "failed": failed,
        "environment": environment(),
    }
    if results:
        write_whole(folder / JSON_NAME, json.dumps(report, indent=2) + "\n")
        write_whole(folder / MARKDOWN_NAME, markdown(report))
    return report


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _dense(folder: Path, cell: Cell) -> Path:
    return folder / f"dense-seed{cell.seed}"


def _finished(folder: Path) -> dict[Cell, dict[str, Any]]:
    """The results of all cells in the folder, whichever command ran them, in the order of a table."""
    results = {}
    for path in folder.glob("cells/*.json"):
        result = read_json(path)
        results[Cell(**result.pop("cell"))] = result
    place = {method: i for i, method in enumerate(METHODS)}  # another quorum than 2 comes last

    def order(cell: Cell) -> tuple:
        return cell.sparsity, place.get(cell.method, len(place)), cell.method, cell.criterion, cell.seed

    return {cell: results[cell] for cell in sorted(results, key=order)}


def _run(recipe: Recipe, cell: Cell, root: Path, data_of: "_DataBySeed") -> None:
    """Trains one cell from the dense model of its seed, which is trained first if it is not there."""
    tokenizer, data = data_of(recipe)
    dense = _dense(root, cell)
    train_phase(recipe, "dense", dense, tokenizer, data)
    for path in dense.glob("checkpoint-*"):
        shutil.rmtree(path)
    work = root / "cells" / cell.name
    result = train_phase(recipe, "sparse", work, tokenizer, data, start=dense)
    result["pruned"] = result.pop("sparsity")  # as measured; the cell has the sparsity that was asked for
    write_whole(
        _file(root, cell), json.dumps({"cell": asdict(cell), **result, "examples": sizes(data)}, indent=2) + "\n"
    )
    shutil.rmtree(work)  # a grid of models fills a disk; `train` makes any one of them again


class _DataBySeed:
    """Loads and tokenizes when the seed changes, for it may choose which rows are taken."""

    def __init__(self):
        self._seed, self._loaded = None, None

    def __call__(self, recipe: Recipe):
        if self._seed != recipe.seed:
            tokenizer, data, _ = prepare(recipe)
            self._seed, self._loaded = recipe.seed, (tokenizer, data)
        return self._loaded


def _recipe_of(recipe: Recipe, cell: Cell) -> Recipe:
    """The recipe that is this cell; what does not score trains for as many backward passes more.

    The dense row goes on at the dense phase's learning rate: one that pruned weights need throws a finished model back.
    """
    values, arguments = recipe.values, recipe.arguments("sparse", recipe.output_dir)
    recovery = dict(values.get("recovery") or {})
    if cell.method == "dense":
        recovery.pop("learning_rate", None)
    steps = arguments.max_steps
    require(steps > 0, "recovery.max_steps", "a number of steps, so that every method gets the same", steps)
    if not cell.scores_by_gradients:
        updates = len(update_steps(replace(recipe.pruning, sparsity=0.5)))  # the same steps at any sparsity but 0
        votes = len(recipe.tasks) - len(recipe.helpers)
        steps += math.ceil(votes * recipe.pruning.score_batches * updates / arguments.gradient_accumulation_steps)
    return parse_recipe(
        {
            **values,
            "seed": cell.seed,
            "pruning": {**(values.get("pruning") or {}), **cell.pruning()},
            "recovery": {**recovery, "max_steps": steps},
        }
    )


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
        values = {"average": [m["average"] for m in metrics]}
        values |= {task: [average({task: m["tasks"][task]}) for m in metrics] for task in metrics[0]["tasks"]}
        paired = [m["average"] - dense[cell.seed] for cell, m in zip(cells, metrics, strict=True) if cell.seed in dense]
        seconds = [sum(results[cell]["seconds"].values()) for cell in cells]
        rows.append(
            {
                "method": method,
                "criterion": criterion,
                "sparsity": sparsity,
                "seeds": [cell.seed for cell in cells],
                "mean": {name: mean(v) for name, v in values.items()},
                "spread": {name: stdev(v) if len(v) > 1 else None for name, v in values.items()},
                "against_dense": mean(paired) if paired else None,
                "backward_passes": max(results[cell]["backward_passes"] for cell in cells),
                "seconds": mean(seconds),
            }
        )
    return rows


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, for the terminal and for Markdown; `a ± b` is mean and standard deviation over seeds."""
    tasks = [name for name in report["rows"][0]["mean"] if name != "average"]
    lines = []
    for row in report["rows"]:
        values = [
            f"{row['mean'][name]:.1f}" + (f" ± {row['spread'][name]:.1f}" if row["spread"][name] is not None else "")
            for name in (*tasks, "average")
        ]
        sparsity = f"{100 * row['sparsity']:g} %" if row["sparsity"] else "0"
        difference = f"{row['against_dense']:+.1f}" if row["sparsity"] and row["against_dense"] is not None else ""
        name = f"{row['method']} {row['criterion']}".rstrip()
        lines.append([name, sparsity, *values, difference, str(len(row["seeds"]))])
    return ["method", "sparsity", *tasks, "average", "against dense", "seeds"], lines


def caption(report: dict[str, Any]) -> str:
    """What the figures of the table are."""
    held_out = ", ".join(f"{task} {size:,}" for task, size in report["cells"][0]["examples"]["validation"].items())
    passes = [row["backward_passes"] for row in report["rows"]]
    budget = f"{min(passes):,}" + (f" to {max(passes):,}" if min(passes) < max(passes) else "")
    return (
        f"Mean ± sample standard deviation over seeds of each task's metrics (0 to 100), on {held_out} held-out examples. "
        f"Every row had {budget} backward passes after dense training, scoring included."
    )


def markdown(report: dict[str, Any]) -> str:
    """The table, its caption and what failed, as Markdown."""
    header, rows = table(report)
    aligned = ["---", *["---:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in (header, aligned, *rows)]
    failed = [f"Failed: {name}: {reason}\n" for name, reason in report["failed"].items()]
    return "\n".join([*lines, "", caption(report), "", *failed]).rstrip() + "\n"


def progress(recipe: Recipe, cells: Sequence[Cell]) -> str:
    """How far a comparison is, for somebody who stopped it."""
    done = sum(_file(Path(recipe.output_dir), cell).is_file() for cell in cells)
    return f"{done} of {len(cells)} cells are done"
