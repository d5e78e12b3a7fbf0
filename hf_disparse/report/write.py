"""Writes an analysis or a comparison as one HTML page that needs no network, and its figures as PNG and SVG."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from hf_disparse.config import UserError

REPORT_NAME, COMPARISON_NAME = "report.html", "compare.html"


def missing_libraries() -> list[str]:
    """The libraries that a report needs and that are not installed."""
    return [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]


def require_libraries() -> None:
    """Raises UserError unless matplotlib and jinja2 are installed; call it before a long computation."""
    if missing := missing_libraries():
        raise UserError(f'report: No module named {missing[0]!r}; try: pip install "hf_disparse[plot]"')


def write_report(analysis: Mapping, folder: str | Path, results: Mapping | None = None) -> Path:
    """Writes `report.html` and `figures/*.png` and `*.svg` into the folder, from what `analysis.json` holds.

    Args:
        results: what the run's `results.json` holds, for the tables on top.

    Returns:
        The path of the page.
    """
    require_libraries()
    from hf_disparse.report.figures import figures_of
    from hf_disparse.report.page import write_page

    facts = {
        "Model": analysis["model"],
        "Tasks": f"{len(analysis['tasks'])}: {', '.join(analysis['tasks'])}",
        "Importance": f"{analysis['criterion']}, {analysis['score_batches']} batches per task, seed {analysis['seed']}",
        "Keep masks": f"each task's own, {100 * analysis['sparsity']:g} % of the prunable weights pruned",
    }
    path = Path(folder) / REPORT_NAME
    data = "analysis.json and results.json" if results else "analysis.json"
    title = f"What each task needs: {Path(analysis['model']).name}"
    write_page(path, title, facts, figures_of(analysis, results), data)
    return path


def write_comparison(report: Mapping, folder: str | Path) -> Path:
    """Writes `compare.html`, `figures/comparison.png` and `.svg` into the folder, from what `compare.json` holds.

    Returns:
        The path of the page.
    """
    require_libraries()
    from hf_disparse.report.figures import figure_of_comparison
    from hf_disparse.report.page import write_page

    tasks = [name for name in report["rows"][0]["mean"] if name != "average"]
    facts = {
        "Tasks": f"{len(tasks)}: {', '.join(tasks)}",
        "Runs": f"{sum(len(row['seeds']) for row in report['rows'])} in {len(report['rows'])} rows",
    }
    if report["failed"]:
        facts["Failed"] = "; ".join(f"{name}: {reason}" for name, reason in report["failed"].items())
    path = Path(folder) / COMPARISON_NAME
    write_page(path, "Pruning methods compared", facts, [figure_of_comparison(report)], "compare.json")
    return path
