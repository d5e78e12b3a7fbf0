"""The figures of a report: title, units, sentence, panels and a table of the same numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from hf_disparse.report import plots, sentences
from hf_disparse.report.values import (
    NAMES_UP_TO,
    SPEED_HEADER,
    blocks,
    curve_tasks,
    extremes,
    kind_names,
    lines_of,
    named_pairs,
    named_tasks,
    number,
    off_diagonal,
    several,
    shown_pairs,
    speed_rows,
    stage_name,
    together,
    whole_layers,
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a report, not yet drawn.

    Args:
        name: of its files and of its anchor on the page.
        units: what the axes show, and in which units.
        sentence: what there is to see.
        panels: (title, function that draws into an Axes) per panel.
        height: of a panel, in CSS pixels.
        across: the most panels side by side on a wide page.
        header, rows: the table of its numbers; None is a missing number. Without panels, the page shows the table at once.
        digits: of the table's fractions.
        note: which numbers the table leaves out, and where they are.
    """

    name: str
    title: str
    units: str
    sentence: str
    panels: Sequence[tuple[str, Callable[[Axes], Axes]]] = ()
    height: int = 300
    across: int = 3
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = field(default=(), repr=False)
    digits: int = 3
    note: str = ""


def figures_of(analysis: Mapping, results: Mapping | None = None) -> list[Figure]:
    """The figures of an analysis, in the order of the page; those without numbers are left out.

    Args:
        results: the content of the run's `results.json`, whose tables come first.
    """
    stages, tasks = analysis["stages"], analysis["tasks"]
    figures = _results_figures(results or {}, analysis["model"])
    if stages:
        figures += [_agreement_figure(stages), _by_kind_figure(stages), _affinity_figure(stages, tasks)]
        figures += [
            _keepers_figure(stages, tasks),
            _keepers_by_kind_figure(stages[-1], tasks),
            _heads_figure(stages, tasks),
            _neurons_figure(stages),
        ]
    if analysis["curve"] and analysis["curve"]["points"]:
        figures.append(_cost_figure(analysis["curve"]))
    if analysis["footprint"]:
        figures.append(_footprint_figure(analysis["footprint"]))
    return [figure for figure in figures if figure]


def _results_figures(results: Mapping, name: str) -> list[Figure]:
    """The tables of a run, as `train` prints them: metrics, and speed if it was measured."""
    tables = []
    if {"dense", "sparse"} <= results.keys():
        metrics = [
            (t, m, x, results["sparse"]["tasks"][t][m])
            for t, ms in results["dense"]["tasks"].items()
            for m, x in ms.items()
        ]
        metrics.append(("average", "", results["dense"]["average"], results["sparse"]["average"]))
        tables.append(
            Figure(
                name="results",
                title="Dense and sparse",
                units="Metrics on validation data, 0 to 100.",
                sentence=sentences.results_sentence(results),
                header=["task", "metric", "dense", "sparse", "difference"],
                rows=[(*row, row[3] - row[2]) for row in metrics],
                digits=1,
            )
        )
    if "speed" in results:
        tables.append(
            Figure(
                name="speed",
                title="Speed on a CPU",
                units="Milliseconds of one pass, and megabytes.",
                sentence=sentences.speed_sentence(results["speed"], name),
                header=SPEED_HEADER,
                rows=speed_rows(results["speed"]),
                digits=1,
            )
        )
    return tables


def _agreement_figure(stages: Sequence[Mapping]) -> Figure:
    """Agreement beyond chance by layer, one panel per stage; with one task, a sentence alone."""
    title, units = (
        "Where tasks agree",
        "Agreement of the tasks' own keep masks beyond chance, by layer: (IoU - c) / (1 - c), ",
    )
    units += "where c is the IoU of independent masks that keep as many weights. 0 is chance, 1 is identical."
    last = lines_of(stages[-1]["agreement"], "all")
    if not last:
        return Figure(name="agreement", title=title, units=units, sentence=sentences.ONE_TASK)
    pairs, rows = named_pairs(last), []
    for stage in stages:
        lines = lines_of(stage["agreement"], "all")
        for who in shown_pairs(lines, pairs) if lines else []:
            label = "all tasks" if who == together(lines) and len(who) > 2 else " + ".join(who)
            for row in lines[who]:
                numbers = [row[key] for key in ("layer", "iou", "chance", "beyond_chance", "low", "high")]
                rows.append([stage_name(stage), label, *numbers])
    hidden = len(last) - len(shown_pairs(last, pairs))
    return Figure(
        name="agreement",
        title=title,
        units=units + " Bands: bootstrap intervals over scoring batches.",
        sentence=sentences.agreement_sentence(stages),
        panels=[
            (stage_name(s), partial(plots.plot_agreement, s["agreement"], watershed=s["watershed"], pairs=pairs))
            for s in stages
        ],
        header=["stage", "tasks", "layer", "IoU", "chance", "beyond chance", "low", "high"],
        rows=rows,
        note=f"The other {hidden:,} pairs are in analysis.json." if hidden else "",
    )


def _by_kind_figure(stages: Sequence[Mapping]) -> Figure | None:
    """All tasks' agreement by layer and kind of matrix; None if there is one task."""
    rows = []
    for stage in stages:
        for kind in kind_names(stage["agreement"]):
            lines = lines_of(stage["agreement"], kind)
            if lines:
                rows += [[stage_name(stage), kind, r["layer"], r["beyond_chance"]] for r in lines[together(lines)]]
    if not rows:
        return None
    limit = max((abs(number(row[3])) for row in rows if row[3] is not None), default=1.0)
    layers = len({row[2] for row in rows})
    return Figure(
        name="agreement-by-matrix",
        title="Which matrices tasks share",
        units="All tasks' agreement beyond chance by layer (down) and kind of matrix (across): 0 is chance, 1 is identical.",
        sentence=sentences.agreement_by_kind_sentence(stages),
        panels=[(stage_name(s), partial(plots.plot_agreement_by_kind, s["agreement"], limit=limit)) for s in stages],
        height=150 + 17 * min(max(layers, 3), 36),
        header=["stage", "matrix", "layer", "beyond chance"],
        rows=rows,
    )


def _affinity_figure(stages: Sequence[Mapping], tasks: Sequence[str]) -> Figure:
    """Shared importance and gradient cosine of the tasks, two panels per stage."""
    title = "Which tasks are alike"
    units = "Shared importance and gradient cosine of each pair of tasks: 1 is identical, and cosines go down to -1."
    if not several(tasks):
        return Figure(name="affinity", title=title, units=units, sentence=sentences.ONE_TASK)
    labels = {"importance": "shared importance", "gradient_cosine": "gradient cosine"}
    limits = {
        key: max((abs(v) for s in stages for v in off_diagonal(s["affinity"][key]).values() if v == v), default=1.0)
        for key in labels
    }
    panels, rows, hidden = [], [], 0
    for stage in stages:
        for key, label in labels.items():
            scale = {"label": label, "limit": limits[key], "diverging": key == "gradient_cosine"}
            draw = partial(plots.plot_affinity, stage["affinity"][key], tasks, **scale)
            panels.append((f"{label}, {stage_name(stage)}", draw))
        cells = off_diagonal(stage["affinity"]["importance"])
        wanted = list(cells)
        if len(tasks) > NAMES_UP_TO:
            wanted = list({p for key in labels for p in extremes(off_diagonal(stage["affinity"][key]))})
        hidden = len(cells) - len(wanted)
        rows += [
            [stage_name(stage), tasks[i], tasks[j], *(stage["affinity"][key][i][j] for key in labels)]
            for i, j in sorted(wanted)
        ]
    return Figure(
        name="affinity",
        title=title,
        units=units,
        sentence=sentences.affinity_sentence(stages[-1], tasks),
        panels=panels,
        height=190 + 16 * min(max(len(tasks), 4), NAMES_UP_TO),
        across=2,
        header=["stage", "task", "other task", *labels.values()],
        rows=rows,
        note=f"The other {hidden:,} pairs of each stage are in analysis.json." if hidden else "",
    )


def _columns(rows: Sequence[Mapping]) -> tuple[list[int], list[list[float]]]:
    """The layers of the keepers' rows, and their shares by number of tasks."""
    return [row["layer"] for row in rows], [row["kept_by"] for row in rows]


def _shares(tasks: int) -> list[str]:
    """The names of the shares by number of tasks, in the table's header."""
    if tasks == 1:
        return ["no task", "the task"]
    return ["no task", "1 task", *(f"{n} tasks" for n in range(2, tasks)), f"all {tasks} tasks"]


def _keepers_figure(stages: Sequence[Mapping], tasks: Sequence[str]) -> Figure | None:
    """Who keeps the weights of whole layers; `_keepers_by_kind_figure` shows single matrices."""
    if not all(whole_layers(stage["keepers"]) for stage in stages):
        return None
    values = [(stage, *_columns(whole_layers(stage["keepers"]))) for stage in stages]
    last, layers, kept = values[-1]
    return Figure(
        name="keepers",
        title="Who keeps what",
        units="Share of each layer's prunable weights by the number of tasks whose own mask keeps them.",
        sentence=sentences.keepers_sentence(last, layers, kept, "prunable weights"),
        panels=[(stage_name(s), partial(plots.plot_keepers, layers, kept)) for s, layers, kept in values],
        header=["stage", "layer", *_shares(len(tasks))],
        rows=[
            [stage_name(s), n, *shares] for s, layers, kept in values for n, shares in zip(layers, kept, strict=True)
        ],
    )


def _keepers_by_kind_figure(stage: Mapping, tasks: Sequence[str]) -> Figure | None:
    """Who keeps the weights of each kind of matrix, at the last stage."""
    kinds = kind_names(stage["keepers"])
    if not kinds:
        return None
    rows = {
        kind: sorted((row for row in stage["keepers"] if row["kind"] == kind), key=lambda row: row["layer"])
        for kind in kinds
    }
    alone = {k: sum(number(row["kept_by"][1]) for row in rows[k]) / len(rows[k]) for k in kinds}
    return Figure(
        name="keepers-by-matrix",
        title="Who keeps what, by matrix",
        units=f"Share of each matrix's weights by the number of tasks whose own mask keeps them, {stage_name(stage)}.",
        sentence=sentences.keepers_by_kind_sentence(alone, tasks),
        panels=[(kind, partial(plots.plot_keepers, *_columns(rows[kind]))) for kind in kinds],
        height=230,
        header=["matrix", "layer", *_shares(len(tasks))],
        rows=[[kind, row["layer"], *row["kept_by"]] for kind in kinds for row in rows[kind]],
    )


def _heads_figure(stages: Sequence[Mapping], tasks: Sequence[str]) -> Figure | None:
    """Which task keeps which head; None if no stage scored heads."""
    stages = [s for s in stages if any(part["granularity"] == "head" for part in s["parts"])]
    if not stages:
        return None
    rows = [
        [stage_name(stage), part["layer"], head, ", ".join(kept) or "none"]
        for stage in stages
        for part in stage["parts"]
        if part["granularity"] == "head"
        for head, kept in enumerate(part["heads"])
    ]
    count = len(rows) // len(stages)
    return Figure(
        name="heads",
        title="Which heads serve which tasks",
        units="Heads (down, layer by layer) by tasks (across), filled where the task's own mask keeps the head.",
        sentence=sentences.heads_sentence(stages[-1], tasks),
        panels=[(stage_name(s), partial(plots.plot_heads, s["parts"], tasks)) for s in stages],
        height=min(900, 160 + max(180, 7 * count)),
        header=["stage", "layer", "head", "kept by"],
        rows=rows,
    )


def _neurons_figure(stages: Sequence[Mapping]) -> Figure | None:
    """The neurons of each layer by the number of tasks that keep them; None if no stage scored neurons."""
    values = []
    for stage in stages:
        parts = sorted((p for p in stage["parts"] if p["granularity"] == "neuron"), key=lambda part: part["layer"])
        if parts:
            kept = [[n / max(1, part["count"]) for n in part["kept_by"]] for part in parts]
            values.append((stage, [part["layer"] for part in parts], kept, parts))
    if not values:
        return None
    stage, layers, kept, parts = values[-1]
    return Figure(
        name="neurons",
        title="How many tasks a neuron serves",
        units="Share of each layer's FFN neurons by the number of tasks whose own mask keeps them; the table has counts.",
        sentence=sentences.keepers_sentence(stage, layers, kept, "neurons"),
        panels=[(stage_name(s), partial(plots.plot_keepers, n, k, what="neurons")) for s, n, k, _ in values],
        header=["stage", "layer", "neurons", *_shares(len(parts[0]["kept_by"]) - 1)],
        rows=[[stage_name(s), p["layer"], p["count"], *p["kept_by"]] for s, _, _, parts in values for p in parts],
    )


def _cost_figure(curve: Mapping) -> Figure:
    """The tasks' metrics against sparsity."""
    tasks, named = curve_tasks(curve), named_tasks(curve)
    shown = tasks if len(tasks) <= NAMES_UP_TO else named
    return Figure(
        name="cost",
        title="What sparsity costs",
        units=f"Metric (0 to 100) against the pruned share of the {curve['denominator']}. Dashed: pruned in one shot, without "
        "further training; solid: after recovery. Rings mark knees.",
        sentence=sentences.cost_sentence(curve),
        panels=[("", partial(plots.plot_cost_curve, curve))],
        height=420,
        header=["sparsity", "recovered", *shown, "average"],
        rows=[
            [p["sparsity"], "yes" if p["recovered"] else "no", *(p["metrics"].get(t) for t in shown), p["average"]]
            for p in sorted(curve["points"], key=lambda p: (p["recovered"], p["sparsity"]))
        ],
        note=f"The other {len(tasks) - len(shown)} tasks are in analysis.json." if len(shown) < len(tasks) else "",
    )


def _footprint_figure(modules: Sequence[Mapping]) -> Figure:
    """Parameters, bytes and multiplications by part of the model, before and after."""
    rows = blocks(modules)
    keys = ["parameters", "nonzeros", "bytes_dense", "bytes_packed", "multiplications", "multiplications_left"]
    header = ["parameters", "non-zeros", "bytes, dense", "bytes, packed", "multiplications", "multiplications left"]
    total = [sum(row[key] for row in rows) for key in keys]
    return Figure(
        name="footprint",
        title="What is left of the model",
        units="Parameters (after: non-zeros), bytes on disk (after: packed) and multiplications per token, by part of the model.",
        sentence=sentences.footprint_sentence(rows),
        panels=[(q, partial(plots.plot_footprint, rows, quantity=q)) for q in plots.FOOTPRINT],
        height=130 + 24 * max(3, min(len(rows), plots.MODULES_UP_TO)),
        header=["module", *header],
        rows=[*([row["module"], *(row[key] for key in keys)] for row in rows), ["all", *total]],
        note=f"All {len(modules)} modules are listed in analysis.json." if len(modules) > len(rows) else "",
    )


def figure_of_comparison(report: Mapping) -> Figure:
    """The figure of `compare.json`: each method's average by sparsity."""
    tasks = [name for name in report["rows"][0]["mean"] if name != "average"]
    times = [row.get("times_as_fast") or {} for row in report["rows"]]
    texts = list(dict.fromkeys(n for row in times for n in row))
    return Figure(
        name="comparison",
        title="Methods compared",
        units="Average of the tasks' metrics (0 to 100) against the pruned share of the prunable weights. "
        "Bars and band: standard deviation over seeds.",
        sentence=sentences.comparison_sentence(report["rows"]),
        panels=[("", partial(plots.plot_comparison, report["rows"]))],
        height=440,
        header=["method", "criterion", "sparsity", "seeds", "average", "± average", *tasks]
        + [f"times as fast, {n} text{'s' * (n != '1')}" for n in texts],
        rows=[
            [r["method"], r["criterion"], r["sparsity"], len(r["seeds"]), r["mean"]["average"], r["spread"]["average"]]
            + [r["mean"][task] for task in tasks]
            + [fast.get(n) for n in texts]
            for r, fast in zip(report["rows"], times, strict=True)
        ],
    )
