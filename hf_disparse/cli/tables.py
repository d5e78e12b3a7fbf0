"""What the commands print: tables, and the lines below them."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hf_disparse.report.sentences import speed_sentence
from hf_disparse.report.values import SPEED_HEADER, speed_cells
from hf_disparse.tasks.averages import average_name


def close_bars() -> None:
    """Closes all progress bars, so that the next output starts on a line of its own."""
    for bar in list(tqdm._instances):
        bar.close()


def print_comparison(report: dict, folder: str, experiment) -> None:
    """Prints the table of a comparison; ends with status 1 if a cell failed."""
    close_bars()
    if report["rows"]:
        header, rows = experiment.table(report)
        shown = new_table(*header)
        for row in rows:
            shown.add_row(*row)
        console = Console()
        (console if console.is_terminal else Console(width=160)).print(shown)  # a file is not limited to 80 columns
        print(experiment.caption(report))
        print(f"written: {folder}/{experiment.markdown_name} and {experiment.json_name}")
    for name, reason in report["failed"].items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if report["failed"]:
        print("the same command tries them again", file=sys.stderr)
        raise typer.Exit(1)


def print_results(results: dict, folder: str) -> None:
    """Prints what a run cost each task and what it saved."""
    print(f"dense against sparse: {folder}")  # not as the table's title, which would wrap at its width
    _print_differences(results, "dense", "sparse")
    print_sparsity(results["sparsity"])
    if "guard" in results:
        print_guard(results["guard"])
    size = results["bytes"]
    print(f"bytes:    dense {size['dense']:,}, sparse {size['sparse']:,} (zeros are stored as they are)")
    print(
        "seconds:  " + ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in results["seconds"].items())
    )
    if "speed" in results:  # not in those of an earlier version
        print_speed(results["speed"], folder)


def print_shrunk(results: dict, folder: str) -> None:
    """Prints what shrinking a model cost each task and what it gained."""
    _print_differences(results, "before", "after")
    print_speed(results["speed"], folder)
    print(f"written: {folder}")


def _print_differences(results: dict, before: str, after: str) -> None:
    """Prints each task's metrics before pruning and after, beside the majority's accuracy where it is known."""
    table = new_table("task", "metric", *(["majority"] if "majority" in results else []), before, after, "difference")

    def add(task: str, metric: str, majority: float | None, dense: float, sparse: float) -> None:
        shown = ["" if majority is None else f"{majority:.1f}"] if "majority" in results else []
        table.add_row(task, metric, *shown, f"{dense:.1f}", f"{sparse:.1f}", f"{sparse - dense:+.1f}")

    for task, metrics in results["dense"]["tasks"].items():
        for metric, dense in metrics.items():
            majority = results["majority"][task] if "majority" in results and metric == "accuracy" else None
            add(task, metric, majority, dense, results["sparse"]["tasks"][task][metric])
    table.add_section()
    dense, sparse = results["dense"], results["sparse"]
    add(average_name(dense["tasks"]), "", None, dense["average"], sparse["average"])
    Console().print(table)


def print_speed(speed: dict, model: str) -> None:
    """Prints what a pass takes dense and sped up, and how to get that speed."""
    table = new_table(*SPEED_HEADER)
    for row in speed_cells(speed):
        table.add_row(*row)
    Console().print(table)
    print(speed_sentence(speed, model))


def print_sparsity(sparsity: dict[str, float]) -> None:
    """Prints the sparsity by denominator on one line."""
    names = {
        "target": "target",
        "prunable": "of the prunable weights",
        "encoder": "of the encoder",
        "model": "of the model",
    }
    print("sparsity: " + ", ".join(f"{100 * sparsity[k]:.1f} % {text}" for k, text in names.items() if k in sparsity))


def print_guard(guard: dict) -> None:
    """Prints on one line which task ended pruning, if any did."""
    stopped = guard["stopped"]
    if stopped is None:
        print("guard:    no task lost more than max_drop allows")
        return
    lost = f"{stopped['task']} lost {stopped['drop']:.1f} points of at most {guard['max_drop'][stopped['task']]:g}"
    undone, kept = (f"{100 * stopped[key]:.1f} %" for key in ("undone", "kept"))
    print(f"guard:    {lost} at {undone}; pruning was undone to {kept} and ended there")


def print_plan(plan: dict) -> None:
    """Prints what a dry run found."""
    table = new_table("task", "training examples", "validation examples", "left out, unlabelled")
    validation = plan["examples"]["validation"]
    for task, rows in plan["examples"]["train"].items():
        judged = f"{validation[task]:,}" if task in validation else "none, a helper"
        table.add_row(task, f"{rows:,}", judged, f"{plan['unlabelled'][task]:,}")
    Console().print(table)
    print(f"prunable weights: {plan['prunable']:,} of {plan['parameters']:,} parameters. Nothing was trained.")


def new_table(*columns: str) -> Table:
    """Returns a table with figures aligned to the right."""
    table = Table()
    for column in columns:
        left = column in ("task", "metric", "method", "model", "measured")
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    return table


def print_analysis(analysis: dict[str, Any], folder: str) -> None:
    """Prints a summary of an analysis: agreement of all tasks by layer, where they diverge, and what sparsity costs."""
    close_bars()
    if analysis["stages"] and len(analysis["tasks"]) > 1:
        _print_agreement(analysis)
    if analysis["curve"]:
        _print_curve(analysis["curve"])
    dense, packed = (sum(row[key] for row in analysis["footprint"]) for key in ("bytes_dense", "bytes_packed"))
    if dense:
        print(f"bytes: {dense:,} as they are, {packed:,} packed")
    page = " and report.html" if Path(folder, "report.html").is_file() else ""
    print(f"written: {folder}/analysis.json{page}")


def _print_agreement(analysis: dict[str, Any]) -> None:
    print(
        f"agreement of {', '.join(analysis['tasks'])} beyond chance (0 = chance, 1 = identical), each keeping "
        f"{100 * (1 - analysis['sparsity']):g} %"
    )
    columns: dict[str, dict[int, str]] = {}
    for stage in analysis["stages"]:
        columns[stage["name"]] = {
            row["layer"]: _with_interval(row)
            for row in stage["agreement"]
            if row["kind"] == "all" and len(row["tasks"]) == len(analysis["tasks"])
        }
    table = new_table("layer", *columns)
    for layer in sorted({layer for rows in columns.values() for layer in rows}):
        table.add_row(str(layer), *[rows.get(layer, "") for rows in columns.values()])
    Console().print(table)
    for stage in analysis["stages"]:
        print(f"watershed {_stage(stage['name'])}: {_watershed(stage['watershed'])}")


def _stage(name: str) -> str:
    return name if name.startswith("before") else f"of the {name} model"


def _with_interval(row: Mapping[str, Any]) -> str:
    shown = f"{row['beyond_chance']:.2f}"
    return shown if row["low"] is None else f"{shown} ({row['low']:.2f} to {row['high']:.2f})"


def _watershed(found: Mapping[str, Any]) -> str:
    if found["layer"] is None:
        return "none"
    between = "" if found["low"] == found["high"] else f", between {found['low']} and {found['high']}"
    return f"layer {found['layer']}{between}"


def _print_curve(curve: Mapping[str, Any]) -> None:
    tasks = list(curve["points"][0]["metrics"])
    table = new_table("sparsity", *tasks, average_name(tasks))
    for point in curve["points"]:
        name = f"{100 * point['sparsity']:g} %" + (", recovered" if point["recovered"] else "")
        table.add_row(name, *[f"{point['metrics'][task]:.1f}" for task in tasks], f"{point['average']:.1f}")
    knees = {name: "none" if at is None else f"{100 * at:g} %" for name, at in curve["knee"].items()}
    table.add_section()
    table.add_row("knee", *[knees[task] for task in tasks], knees["average"])
    Console().print(table)
    within = curve["within"]
    if within:
        at = "no sparsity" if within["sparsity"] is None else f"{100 * within['sparsity']:g} %"
        print(f"highest sparsity at which no task loses more than {within['points']:g} points: {at}")
