"""`hf-disparse compare --protocol equal-budget`: the best ensemble of single-task models against one shared model. Layer 10.

Both have the same number of kept prunable weights: the ensemble shares it out to one encoder per task, by the best choice
along each task's sparsity curve; the shared model has all of it. And both have the same number of backward passes: every
single-task model has the recipe's steps, and the shared model T times as many, T being the number of tasks; its schedule
is stretched likewise. Helpers are left out on both sides. Protocol: Xia and Shin 2021 (arXiv 2112.05705).

The folder `equal-budget` in the output folder holds the dense models and one file per finished cell, as in `compare`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any

from hf_disparse.compare.runner import cell_file, run_cells
from hf_disparse.compare.tables import held_out, markdown, over_seeds, shown, write_tables
from hf_disparse.config import UserError, require
from hf_disparse.distributed.processes import on_main
from hf_disparse.files import read_json
from hf_disparse.recipes.recipe import Recipe, parse_recipe
from hf_disparse.runs.folder import DELETE, refuse_others
from hf_disparse.runs.setup import environment
from hf_disparse.tasks import average, average_name, counted_tasks

FOLDER_NAME, JSON_NAME, MARKDOWN_NAME = "equal-budget", "equal-budget.json", "equal-budget.md"
_STRETCHED = ("max_steps", "warmup_steps", "logging_steps", "eval_steps", "save_steps")  # fractions below 1 stay


@dataclass(frozen=True)
class Cell:
    """One training from dense to sparse.

    Args:
        task: of a single-task model; None for the shared one.
        sparsity: of its encoder.
    """

    task: str | None
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self._who}-{self.sparsity}-seed{self.seed}"

    @property
    def start(self) -> str:
        """What the dense model is called that it starts from."""
        return f"dense-{self._who}-seed{self.seed}"

    @property
    def _who(self) -> str:
        return "shared" if self.task is None else f"task-{self.task}"


@dataclass(frozen=True)
class Race:
    """What is raced, all of it refused at birth if it cannot be.

    Args:
        sparsities: the curve of every task.
        budgets: in weights of one encoder: at 0.3 the shared model keeps 30 %, and the encoders of an ensemble 30 % of one
            encoder together. By default those of 1 - `sparsities` that an ensemble can meet.
    """

    recipe: Recipe
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    budgets: tuple[float, ...] = ()

    def __post_init__(self):
        recipe = self.recipe
        tasks = self.tasks
        require(len(tasks) > 1, "tasks", "at least two with --protocol equal-budget", tasks)
        granularity, drops = recipe.pruning.granularity, recipe.pruning.max_drop
        require(granularity == ("weight",), "pruning.granularity", "weight, for that is a budget's unit", granularity)
        require(drops is None, "pruning.max_drop", "nothing where all have the sparsity they are named by", drops)
        for phase in ("dense", "sparse"):
            metric = recipe.arguments(phase, recipe.output_dir).metric_for_best_model
            of_any = metric is None or metric.removeprefix("eval_") in ("average", "loss")
            expected = "average or loss with --protocol equal-budget, whose models have a task each"
            require(of_any, "training.metric_for_best_model", expected, metric)
        require(recipe.dense_from is None, "dense_from", "nothing with --protocol equal-budget", recipe.dense_from)
        for sparsity in self.sparsities:
            require(0 < sparsity < 1, "--sparsities", "numbers in (0, 1)", sparsity)
        for budget in self.budgets:
            require(0 < budget <= 1, "--budgets", "numbers in (0, 1], fractions of one encoder", budget)
        least = len(tasks) * (1 - exact(max(self.sparsities)))
        budgets = [exact(b) for b in self.budgets] or [b for s in self.sparsities if (b := 1 - exact(s)) >= least]
        if not budgets or min(budgets) < least:
            got = f"{float(min(budgets)):g}" if budgets else f"sparsities up to {max(self.sparsities):g}"
            raise UserError(
                f"--budgets: expected at least {float(least):g}, for that is what {len(tasks)} encoders at the highest of "
                f"--sparsities keep, got {got}; add higher sparsities"
            )
        for key, values in (("sparsities", self.sparsities), ("seeds", self.seeds), ("budgets", map(float, budgets))):
            object.__setattr__(self, key, tuple(dict.fromkeys(values)))

    @property
    def tasks(self) -> list[str]:
        """Those with a vote."""
        return list(self.recipe.voters)

    @property
    def cells(self) -> list[Cell]:
        """One seed after the other, first the curves."""
        shared = [float(1 - exact(budget)) for budget in self.budgets]
        who = [(task, sparsity) for task in self.tasks for sparsity in self.sparsities] + [(None, s) for s in shared]
        return [Cell(task, sparsity, seed) for seed in self.seeds for task, sparsity in who]

    @property
    def folder(self) -> Path:
        """Of the dense models and the cells."""
        return Path(self.recipe.output_dir, FOLDER_NAME)


def exact(number: float) -> Fraction:
    """The number as it is written: 0.1 is a tenth, so that three encoders at sparsity 0.9 fit a budget of 0.3."""
    return Fraction(str(number))


def best_ensemble(curve: Mapping[str, Mapping[float, float]], budget: float) -> dict[str, float] | None:
    """One sparsity per task so that the sum of the metrics is largest and that of the kept fractions within the budget.

    Exact, by dynamic programming over the sums of what is kept; of equally good choices that which keeps least.

    Args:
        curve: task -> sparsity -> metric, higher is better.
        budget: in units of one encoder.

    Returns:
        Task -> sparsity, or None if no choice fits.
    """
    best: dict[Fraction, tuple[float, tuple[float, ...]]] = {Fraction(0): (0.0, ())}  # kept -> (metrics, choice)
    for points in curve.values():
        longer: dict[Fraction, tuple[float, tuple[float, ...]]] = {}
        for kept, (total, chosen) in best.items():
            for sparsity, metric in points.items():
                now = kept + 1 - exact(sparsity)
                if now <= exact(budget) and (now not in longer or longer[now][0] < total + metric):
                    longer[now] = (total + metric, (*chosen, sparsity))
        best = longer
    if not best:
        return None
    _, chosen = best[max(best, key=lambda kept: (best[kept][0], -kept))]
    return dict(zip(curve, chosen, strict=True))


def recipe_of(race: Race, cell: Cell) -> Recipe:
    """The recipe that is this cell: of one task, or of all with T times the steps."""
    recipe, values, tasks = race.recipe, race.recipe.values, race.tasks if cell.task is None else [cell.task]
    pruning, phases = recipe.pruning, {}
    fields = {"sparsity": cell.sparsity, "keep_scores": False}
    if cell.task is not None and pruning.decision == "quorum":
        fields |= {"decision": "unanimous", "quorum": 1}  # of one task, all decisions by its scores are one
    times = len(tasks)
    for key in ("start_step", "end_step", "update_every"):
        if getattr(pruning, key) is not None:
            fields[key] = times * getattr(pruning, key)
    for phase, section in (("dense", "training"), ("sparse", "recovery")):
        arguments = recipe.arguments(phase, recipe.output_dir)
        steps = arguments.max_steps
        require(
            steps > 0, f"{section}.max_steps", "a number of steps, which the shared model has for every task", steps
        )
        given = {key: getattr(arguments, key) for key in _STRETCHED}
        stretched = {key: times * n if n >= 1 else n for key, n in given.items() if n is not None}
        phases[section] = {**(values.get(section) or {}), **stretched}
    teachers = {task: name for task, name in recipe.teachers.items() if task in tasks}
    return parse_recipe(
        {
            **values,
            **phases,
            "tasks": {task: values["tasks"][task] for task in tasks},
            "helpers": [],
            "teachers": teachers,
            "seed": cell.seed,
            "pruning": {**(values.get("pruning") or {}), **fields},
        }
    )


def run(race: Race) -> dict[str, Any]:
    """Runs the cells that are not there yet, and tabulates those of this race; writes `equal-budget.json` and `.md`.

    A cell that fails is reported and leaves the others alone; the next call tries it again.

    Returns:
        What `equal-budget.json` holds: `rows` (an ensemble and the shared model per budget), `curve` (task -> sparsity ->
        metric, the mean over seeds), `cells`, `failed` (cell -> reason) and `environment`.
    """
    recipe, folder = race.recipe, race.folder
    refuse_others(Path(recipe.output_dir), recipe)
    recipes = {cell: recipe_of(race, cell) for cell in race.cells}  # refuses nonsense before anything runs
    whole = replace(recipe, helpers=(), tasks={task: recipe.tasks[task] for task in race.tasks})  # whose data is loaded
    of_one_seed = sorted(race.cells[: len(race.cells) // len(race.seeds)], key=lambda cell: cell.sparsity)
    most = {cell.task: cell for cell in of_one_seed}  # the sparsest of each model
    failed = run_cells(whole, recipes, folder, list(most.values()))
    results = {
        cell: read_json(cell_file(folder, cell), DELETE) for cell in recipes if cell_file(folder, cell).is_file()
    }
    rows, curve = tabulate(race, results)
    report = {
        "rows": rows,
        "curve": curve,
        "cells": [{**asdict(cell), **{k: v for k, v in r.items() if k != "cell"}} for cell, r in results.items()],
        "failed": failed,
        "environment": environment(),
    }
    if results:
        _write(report, Path(recipe.output_dir))
    return report


@on_main
def _write(report: dict[str, Any], folder: Path) -> None:
    write_tables(report, folder, JSON_NAME, MARKDOWN_NAME, markdown(report, table, caption))


def tabulate(race: Race, results: Mapping[Cell, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, dict]]:
    """Two rows per budget, each over its seeds, and the curve that the ensembles were chosen by.

    The choice is one for all seeds, by the mean over them; a point that failed for every seed is no choice, and a seed
    that lacks another point has no ensemble. `against_ensemble` pairs the seeds that both have.
    """
    curve = {
        task: {s: v for s in race.sparsities if (v := [c for c in results if (c.task, c.sparsity) == (task, s)])}
        for task in race.tasks
    }
    seeds = [
        seed
        for seed in race.seeds
        if all(any(cell.seed == seed for cell in cells) for points in curve.values() for cells in points.values())
    ]
    values = {
        task: {
            s: mean(_value(results[cell], task) for cell in cells if cell.seed in seeds) for s, cells in points.items()
        }
        for task, points in (curve.items() if seeds else ())
    }
    counted = {t: v if t in counted_tasks(race.tasks) else dict.fromkeys(v, 0.0) for t, v in values.items()}
    rows = []
    for budget in race.budgets:
        chosen = best_ensemble(counted, budget) if values else None
        averages = {}
        if chosen:
            models = {seed: [Cell(task, s, seed) for task, s in chosen.items()] for seed in seeds}
            rows.append(_row("ensemble", budget, chosen, models, results))
            averages = {seed: _metrics(cells, results)["average"] for seed, cells in models.items()}
        sparsity = float(1 - exact(budget))
        shared = {c.seed: [c] for c in results if c.task is None and c.sparsity == sparsity}
        if shared:
            row = _row("shared", budget, dict.fromkeys(race.tasks, sparsity), shared, results)
            paired = [
                _metrics(c, results)["average"] - averages[seed] for seed, c in shared.items() if seed in averages
            ]
            rows.append(row | {"against_ensemble": mean(paired) if paired else None})
    return rows, values


def _row(model: str, budget: float, sparsities: dict[str, float], cells: dict[int, list[Cell]], results) -> dict:
    """Seed -> the cells that make the model of that seed; mean and sample standard deviation over the seeds."""
    metrics = [_metrics(of_seed, results) for of_seed in cells.values()]
    every = [[results[cell] for cell in of_seed] for of_seed in cells.values()]
    size = every[0][0]["prunable"]
    return {
        "budget": budget,
        "model": model,
        "sparsities": sparsities,
        "kept": sum(size - round(cell.sparsity * size) for cell in next(iter(cells.values()))),
        "seeds": list(cells),
        **over_seeds(metrics),
        "against_ensemble": None,
        "backward_passes": max(sum(r["backward_passes"] + r["dense_backward_passes"] for r in rs) for rs in every),
        "seconds": mean(sum(sum(r["seconds"].values()) for r in rs) for rs in every),
    }


def _metrics(cells: Sequence[Cell], results: Mapping[Cell, dict[str, Any]]) -> dict[str, Any]:
    """Of one model, or of the models of an ensemble together."""
    tasks = {task: metrics for cell in cells for task, metrics in results[cell]["metrics"]["tasks"].items()}
    return {"tasks": tasks, "average": average(tasks)}


def _value(result: dict[str, Any], task: str) -> float:
    return average({task: result["metrics"]["tasks"][task]})


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, for the terminal and for Markdown; in brackets the sparsity of a task's encoder."""
    rows = report["rows"]
    tasks = list(rows[0]["sparsities"])
    lines = []
    for row in rows:
        sparsities, model = {task: f" ({100 * s:g} %)" for task, s in row["sparsities"].items()}, row["model"]
        if model == "shared":  # one encoder, one sparsity
            model, sparsities = model + sparsities[tasks[0]], {}
        values = [shown(row, name) + sparsities.get(name, "") for name in (*tasks, "average")]
        difference = "" if row["against_ensemble"] is None else f"{row['against_ensemble']:+.1f}"
        lines.append([model, f"{100 * row['budget']:g} %", *values, difference, str(len(row["seeds"]))])
    return ["model", "budget", *tasks, average_name(tasks), "against ensemble", "seeds"], lines


def caption(report: dict[str, Any]) -> str:
    """What the figures of the table are."""
    passes = {
        model: ", ".join(
            f"{n:,}" for n in sorted({r["backward_passes"] for r in report["rows"] if r["model"] == model})
        )
        for model in ("ensemble", "shared")
    }
    times = len({task for cell in report["cells"] for task in cell["examples"]["validation"]})
    return (
        f"Mean ± sample standard deviation over seeds of each task's metrics (0 to 100), on {held_out(report)} held-out examples. "
        "A budget is the kept prunable weights as a share of one encoder's; an ensemble has one encoder per task within it, "
        "at the sparsities in brackets, the best choice along the tasks' curves by the mean over seeds on the same "
        f"held-out examples. The shared model trains {times} times as many steps as each single-task model: "
        f"{passes['ensemble'] or 'no'} backward passes per ensemble and {passes['shared'] or 'no'} per shared model, dense "
        "training and scoring included."
    )
