"""Compares methods on one recipe, each at the same number of backward passes, and writes one table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from hf_disparse.compare.runner import run_cells
from hf_disparse.compare.tables import (
    held_out,
    over_seeds,
    shown,
    shown_speed,
    span,
    speed_caption,
    times_as_fast,
    write_tables,
)
from hf_disparse.config import CRITERIA, PruningConfig, UserError, closest, require, without_ignored
from hf_disparse.config.rows import NAMES, find_row, has_open_criterion
from hf_disparse.distributed.processes import on_main
from hf_disparse.files import read_json, writing
from hf_disparse.methods import method_class
from hf_disparse.recipes.recipe import Recipe, parse_recipe
from hf_disparse.report.values import method_name
from hf_disparse.report.write import missing_libraries, write_comparison
from hf_disparse.runs.folder import DELETE, refuse_others
from hf_disparse.runs.setup import environment
from hf_disparse.tasks.averages import average_name

# What a row takes from a recipe of another method.
_OF_ANY_METHOD = ("target_modules", "exclude_modules", "score_batches")


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        method: a row of `hf_disparse.config.rows`, such as `dense`, `unanimous`, `quorum3` or `2:4`.
        criterion: the criterion of a row that leaves it open; empty for the others.
        sparsity: 0 for the dense row.
    """

    method: str
    criterion: str
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        method = self.method.replace(":", "of")
        parts = [method, self.criterion, str(self.sparsity) if self.sparsity else "", f"seed{self.seed}"]
        return "-".join(part for part in parts if part)

    @property
    def start(self) -> str:
        """The name of the dense model that it starts from."""
        return f"dense-seed{self.seed}"

    def pruning(self, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the section `pruning` of the cell.

        A row of the recipe's method takes all settings from the recipe's section, `values`, others take modules and
        `score_batches`. None takes a setting that it would ignore.
        """
        own = {"sparsity": self.sparsity, "keep_scores": False}
        of_any_method = {key: values[key] for key in _OF_ANY_METHOD if key in values}
        if self.method == "dense":
            return of_any_method | own
        config, row = find_row(self.method)
        if config.method == values.get("method", PruningConfig.method):
            source, not_taken = values, ("decision", "quorum", "reinitialise")  # each row has its own
        else:
            source, not_taken = of_any_method, config.row_defaults
        taken = {key: value for key, value in source.items() if key not in not_taken}
        criterion = {"criterion": self.criterion} if self.criterion else {}
        return without_ignored({"method": config.method, **taken, **row, **criterion, **own})


def default_criterion(config: PruningConfig) -> str:
    """Returns the criterion of rows that leave it open: the recipe's, unless only some decisions can have it."""
    of_any_decision = config.criterion in CRITERIA and config.criterion != "agreement"
    return config.criterion if of_any_decision else PruningConfig.criterion


def grid(
    methods: Sequence[str], criteria: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """Returns the cells of a comparison, seed by seed; a row with its own criterion appears once for all criteria.

    A pattern N:M has its own sparsity, whatever `sparsities` says.
    """
    for method in methods:
        if method != "dense" and find_row(method) is None:
            raise UserError(f"methods: unknown method {method!r}{closest(method, NAMES)}")
    for criterion in criteria:
        if criterion not in CRITERIA:
            raise UserError(f"criteria: unknown criterion {criterion!r}{closest(criterion, CRITERIA)}")
    for sparsity in sparsities:
        require(0 < sparsity < 1, "sparsities", "numbers in (0, 1); the method dense is the one without", sparsity)
    cells = [
        Cell(
            method,
            criterion if has_open_criterion(method) else "",
            _sparsity(method, sparsity),
            seed,
        )
        for seed in seeds
        for sparsity in sparsities
        for method in methods
        for criterion in criteria
    ]
    return list(dict.fromkeys(cells))


def _sparsity(method: str, sparsity: float) -> float:
    if method == "dense":
        return 0.0
    kept, colon, of = method.partition(":")
    return 1 - int(kept) / max(1, int(of)) if colon else sparsity


def recipe_of(recipe: Recipe, cell: Cell) -> Recipe:
    """Returns the recipe of a cell, with as many steps as give it the recipe's backward passes, scoring included.

    The budget is the recipe's own steps and its scoring batches; if it prunes by scores, these count even if its criterion
    needs no gradients. The dense row continues at the dense phase's learning rate: the one that pruned weights need would set a
    finished model back.
    """
    values, arguments = recipe.values, recipe.sparse
    recovery = dict(values.get("recovery") or {})
    if cell.method == "dense":
        recovery.pop("learning_rate", None)
    if recipe.pruning.max_drop is not None:
        raise UserError("pruning.max_drop: must not be set in a comparison, whose rows have the sparsity they name")
    most = arguments.max_steps
    require(most > 0, "recovery.max_steps", "a number of steps, so that every method gets the same", most)
    pruning = cell.pruning(dict(values.get("pruning") or {}))
    own = PruningConfig.from_dict(pruning, "pruning")
    votes, every = len(recipe.voters), arguments.gradient_accumulation_steps
    whole = recipe.pruning
    if whole.method == PruningConfig.method:
        whole = replace(whole, criterion="snip", sparsity=whole.sparsity or 0.5)
    budget = most * every + votes * scoring_batches(whole, most)
    least = votes * scoring_batches(own, 1)
    if least > budget:
        raise UserError(
            f"recovery.max_steps: scoring alone takes {cell.name} {least} backward passes, but the budget is {budget}; "
            "raise it, or set pruning.score_batches lower in a recipe that prunes by scores"
        )
    steps = next(n for n in count(1) if n * every + votes * scoring_batches(own, n) >= budget)
    return parse_recipe(
        {
            **values,
            "seed": cell.seed,
            "pruning": pruning,
            "recovery": {**recovery, "max_steps": steps},
        }
    )


def scoring_batches(config: PruningConfig, max_steps: int) -> int:
    """Returns how many batches per task are scored in a training of `max_steps`."""
    return config.score_batches * method_class(config).scorings(config, max_steps)


@dataclass(frozen=True)
class ByMethod:
    """The experiment that compares methods at equal numbers of backward passes; it has the methods of `EqualBudget`.

    Args:
        recipe: the recipe that every cell is a variant of.
        cells: the runs, as `grid` lists them.
    """

    recipe: Recipe
    cells: Sequence[Cell]

    json_name: ClassVar[str] = "compare.json"
    markdown_name: ClassVar[str] = "compare.md"

    @property
    def folder(self) -> Path:
        """The folder of the dense models and the cells."""
        return Path(self.recipe.output_dir)

    def run(self) -> dict[str, Any]:
        """Runs the cells without a result yet; writes all results to `compare.json` and `compare.md`, and with matplotlib a page.

        A cell that fails is reported, and the others still run; the next call tries it again. With several processes, a failure
        ends all.

        Returns:
            The content of `compare.json`: `rows` (one per method, criterion and sparsity, over the seeds) and `cells`, of all that
            the folder has, `failed` (cell -> reason, of this call) and `environment`.
        """
        recipe, cells, folder = self.recipe, self.cells, self.folder
        refuse_others(folder, recipe)
        recipes = {cell: recipe_of(recipe, cell) for cell in cells}  # refuses mistakes before anything runs
        _finished(folder)  # refuses files that are not of a cell
        sparsest = {}  # cell of each method and granularity
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
            write_tables(report, folder, self)
            _write_page(report, folder)
        return report

    @staticmethod
    def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows as text, for the terminal and Markdown; `a ± b` is mean and standard deviation over seeds."""
        tasks = [name for name in report["rows"][0]["mean"] if name != "average"]
        lines = []
        for row in report["rows"]:
            values = [shown(row, name) for name in (*tasks, "average")]
            sparsity = f"{100 * row['sparsity']:g} %" if row["sparsity"] else "0"
            difference = f"{row['against_dense']:+.1f}" if row["sparsity"] and row["against_dense"] is not None else ""
            lines.append([method_name(row), sparsity, *values, difference, str(len(row["seeds"])), shown_speed(row)])
        return ["method", "sparsity", *tasks, average_name(tasks), "against dense", "seeds", "times as fast"], lines

    @staticmethod
    def caption(report: dict[str, Any]) -> str:
        """Returns the sentences below the table."""
        budget = span([row["backward_passes"] for row in report["rows"]])
        precisions = sorted({cell.get("precision") for cell in report["cells"]} - {None})  # None: of an earlier version
        computed = f" Computed in {' and '.join(precisions)}." if precisions else ""
        return (
            f"Mean ± sample standard deviation over seeds of each task's metrics (0 to 100), on {held_out(report)} held-out examples. "
            f"Every row had {budget} backward passes after dense training, scoring included.{computed}{speed_caption(report)}"
        )


@on_main
def _write_page(report: dict[str, Any], folder: Path) -> None:
    if not missing_libraries():  # of the extra `plot`
        with writing(folder):
            write_comparison(report, folder)


def _finished(folder: Path) -> dict[Cell, dict[str, Any]]:
    """The results of all cells in the folder, whichever command ran them, in the order of a table."""
    results = {}
    for path in folder.glob("cells/*.json"):
        result = read_json(path, DELETE)
        try:
            results[Cell(**result.pop("cell"))] = result
        except (KeyError, TypeError):
            raise UserError(f"{path}: expected a cell of this comparison, got something else.\n{DELETE}") from None
    place = {method: i for i, method in enumerate(NAMES)}  # another quorum than 2 comes last

    def order(cell: Cell) -> tuple:
        return cell.sparsity, place.get(cell.method, len(place)), cell.method, cell.criterion, cell.seed

    return {cell: results[cell] for cell in sorted(results, key=order)}


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
                "times_as_fast": times_as_fast([[results[cell]] for cell in cells]),
            }
        )
    return rows
