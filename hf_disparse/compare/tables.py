"""What the tables of both protocols share."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hf_disparse.files import write_whole, writing
from hf_disparse.tasks import average


def write_tables(report: dict[str, Any], folder: Path, json_name: str, markdown_name: str, text: str) -> None:
    """Writes a report as JSON, and its text beside it."""
    with writing(folder):
        write_whole(folder / json_name, json.dumps(report, indent=2) + "\n")
        write_whole(folder / markdown_name, text)


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


def markdown(report: dict[str, Any], table: Callable, caption: Callable) -> str:
    """The table, its caption and what failed, as Markdown; the first two as the report's protocol has them."""
    lines = [*markdown_table(*table(report)), "", caption(report), ""] if report["rows"] else []
    failed = [f"Failed: {name}: {reason}\n" for name, reason in report["failed"].items()]
    return "\n".join([*lines, *failed]).rstrip() + "\n"
