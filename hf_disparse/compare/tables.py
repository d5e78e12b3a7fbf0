"""What the tables of both experiments share."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hf_disparse.distributed.processes import on_main
from hf_disparse.files import write_whole, writing
from hf_disparse.tasks.averages import average


@on_main
def write_tables(report: dict[str, Any], folder: Path, experiment: Any) -> None:
    """Writes a report as JSON, and its table beside it as Markdown."""
    with writing(folder):
        write_whole(folder / experiment.json_name, json.dumps(report, indent=2) + "\n")
        write_whole(folder / experiment.markdown_name, markdown(report, experiment))


def over_seeds(metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Returns `mean` and `spread` (sample standard deviation, None for one seed) of each task and of `average`."""
    values = {"average": [m["average"] for m in metrics]}
    values |= {task: [average({task: m["tasks"][task]}) for m in metrics] for task in metrics[0]["tasks"]}
    return {
        "mean": {name: mean(v) for name, v in values.items()},
        "spread": {name: stdev(v) if len(v) > 1 else None for name, v in values.items()},
    }


def times_as_fast(models: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float] | None:
    """Returns how many times as fast as one dense encoder a model's sped-up encoders are together, the mean over seeds.

    Args:
        models: the results of each seed's cells, one per encoder.

    Returns:
        Number of texts -> x, or None if an earlier version ran the cells, which did not measure it.
    """
    times = [[cell["speed"]["milliseconds"] for cell in cells] for cells in models if all("speed" in c for c in cells)]
    measured = [texts for texts in times[0][0] if all(texts in t for model in times for t in model)] if times else []

    def ratio(model: Sequence[dict[str, Any]], texts: str) -> float:
        each = [t[texts] for t in model]
        return mean(t["dense"] for t in each) / sum(t.get("fast", t["dense"]) for t in each)

    return {texts: mean(ratio(model, texts) for model in times) for texts in measured} or None


def shown_speed(row: dict[str, Any]) -> str:
    """Returns `x / y`, times as fast for one text and for a batch, or nothing where it was not measured."""
    return " / ".join(f"{x:.1f}" for x in (row.get("times_as_fast") or {}).values())


def speed_caption(report: dict[str, Any]) -> str:
    """Returns the sentence on the column `times as fast`, or nothing where it was not measured."""
    speeds = [cell["speed"] for cell in report["cells"] if "speed" in cell]
    if not speeds:
        return ""
    texts = " / ".join(f"{n} text{'s' * (n != '1')}" for n in speeds[0]["milliseconds"])
    length = span([speed["tokens"] for speed in speeds])
    return (
        f" Times as fast: {texts} of {length} tokens on one core, after hf_disparse.speed_up(model), against one dense encoder "
        "in plain torch."
    )


def shown(row: dict[str, Any], name: str) -> str:
    """Returns `a ± b` for a task or the average in a row of `over_seeds`."""
    spread = row["spread"][name]
    return f"{row['mean'][name]:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table whose first column is text."""
    aligned = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, aligned, *rows)]


def held_out(report: dict[str, Any]) -> str:
    """Returns the number of examples each task is measured on, a range if it differs between seeds."""
    sizes: dict[str, list[int]] = {}
    for cell in report["cells"]:
        for task, size in cell["examples"]["validation"].items():
            sizes.setdefault(task, []).append(size)
    return ", ".join(f"{task} {span(found)}" for task, found in sizes.items())


def span(numbers: Sequence[int]) -> str:
    """Returns '3' if all numbers are equal, otherwise 'min to max'."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def markdown(report: dict[str, Any], experiment: Any) -> str:
    """Returns the experiment's table and caption, and what failed, as Markdown."""
    lines = [*markdown_table(*experiment.table(report)), "", experiment.caption(report), ""] if report["rows"] else []
    failed = [f"Failed: {name}: {reason}\n" for name, reason in report["failed"].items()]
    return "\n".join([*lines, *failed]).rstrip() + "\n"
