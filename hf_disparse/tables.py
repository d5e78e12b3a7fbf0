"""What the commands print when they are done. Layer 10."""

from rich.console import Console
from rich.table import Table


def print_results(results: dict, folder: str) -> None:
    """One table of what a run cost each task, and what it saved."""
    print(f"dense against sparse: {folder}")  # not as the table's title, which would be folded to its width
    table = table_of("task", "metric", "majority", "dense", "sparse", "difference")
    for task, metrics in results["dense"]["tasks"].items():
        for metric, dense in metrics.items():
            sparse = results["sparse"]["tasks"][task][metric]
            majority = results["majority"][task] if metric == "accuracy" else None
            shown = "" if majority is None else f"{majority:.1f}"
            table.add_row(task, metric, shown, f"{dense:.1f}", f"{sparse:.1f}", f"{sparse - dense:+.1f}")
    dense, sparse = results["dense"]["average"], results["sparse"]["average"]
    table.add_section()
    table.add_row("average", "", "", f"{dense:.1f}", f"{sparse:.1f}", f"{sparse - dense:+.1f}")
    Console().print(table)
    print_sparsity(results["sparsity"])
    if "guard" in results:
        print_guard(results["guard"])
    size = results["bytes"]
    print(f"bytes:    dense {size['dense']:,}, sparse {size['sparse']:,} (zeros are stored as they are)")
    print(
        "seconds:  " + ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in results["seconds"].items())
    )


def print_sparsity(sparsity: dict[str, float]) -> None:
    """Sparsity by denominator, on one line."""
    names = {
        "target": "target",
        "prunable": "of the prunable weights",
        "encoder": "of the encoder",
        "model": "of the model",
    }
    print("sparsity: " + ", ".join(f"{100 * sparsity[k]:.1f} % {text}" for k, text in names.items() if k in sparsity))


def print_guard(guard: dict) -> None:
    """Which task ended pruning, on one line."""
    stopped = guard["stopped"]
    if stopped is None:
        print("guard:    no task lost more than it may")
        return
    lost = f"{stopped['task']} lost {stopped['drop']:.1f} points of at most {guard['max_drop'][stopped['task']]:g}"
    undone, kept = (f"{100 * stopped[key]:.1f} %" for key in ("undone", "kept"))
    print(f"guard:    {lost} at {undone}, which was undone to {kept}, where pruning ended")


def print_plan(plan: dict) -> None:
    """What a dry run found."""
    table = table_of("task", "training examples", "validation examples", "left out, unlabelled")
    for task, rows in plan["examples"]["train"].items():
        table.add_row(task, f"{rows:,}", f"{plan['examples']['validation'][task]:,}", f"{plan['unlabelled'][task]:,}")
    Console().print(table)
    print(f"prunable weights: {plan['prunable']:,} of {plan['parameters']:,} parameters. Nothing was trained.")


def table_of(*columns: str) -> Table:
    table = Table()
    for column in columns:
        left = column in ("task", "metric", "method")
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    return table
