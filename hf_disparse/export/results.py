"""`results.json`: what a run measured, and the same from a Trainer's log."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_disparse.config import TaskConfig, UserError, one_line
from hf_disparse.files import read_json

RESULTS_NAME = "results.json"


def read_results(folder: Path) -> dict[str, Any]:
    """The results in a model's folder, {} if there are none."""
    path = folder / RESULTS_NAME
    return read_json(path) if path.is_file() else {}


@contextmanager
def using_results(folder: Path) -> Iterator[None]:
    """Raises UserError where the block finds that results.json is not what training writes."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / RESULTS_NAME}: not what training writes ({type(error).__name__}: {one_line(error)}).\n"
            "Restore the original file or remove it."
        ) from error


def losses_of_log(history: list[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The training losses in a Trainer's `state.log_history`, each with the step and the sparsity at which it was logged."""
    rows = (row for row in history if "loss" in row)
    return [{"step": row["step"], "loss": row["loss"], "sparsity": row.get("sparsity", 0.0)} for row in rows]


def results_of_log(history: list[Mapping[str, Any]], tasks: Mapping[str, TaskConfig]) -> dict[str, Any]:
    """The part of `results.json` that a Trainer's `state.log_history` holds: the last evaluation and the losses."""
    results = {"log": [{"phase": "training", **row} for row in losses_of_log(history)]}
    last = next((row for row in reversed(history) if "eval_average" in row), None)
    if last:
        values = {
            name: {m: 100 * last[f"eval_{name}_{m}"] for m in task.metric if f"eval_{name}_{m}" in last}
            for name, task in tasks.items()
        }
        shown = {name: metrics for name, metrics in values.items() if metrics}
        results["sparse"] = {"tasks": shown, "average": 100 * last["eval_average"]}
    return results
