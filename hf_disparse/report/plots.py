"""One function per plot: draws plain values into a matplotlib Axes and returns it.

Rows have the form of `analysis.json` and `compare.json`. Names are drawn literally, never as markup or mathematics.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from hf_disparse.report.theme import BAND, COLOURS, GRID, INK, MARKERS, MUTED, PAPER
from hf_disparse.report.values import (
    BANDS_UP_TO,
    NAMES_UP_TO,
    TASKS_UP_TO,
    kind_names,
    lines_of,
    method_name,
    named_pairs,
    named_tasks,
    number,
    several,
    short,
    together,
)

MODULES_UP_TO = 20
FOOTPRINT = {
    "parameters": ("parameters", "nonzeros"),
    "bytes": ("bytes_dense", "bytes_packed"),
    "multiplications": ("multiplications", "multiplications_left"),
}
KEPT_BY = {"kept by this task alone": COLOURS[1], "by some tasks": COLOURS[0], "by all tasks": INK}


def plot_agreement(
    rows: Sequence[Mapping], ax: Axes, watershed: Mapping | None = None, pairs: Sequence[tuple] | None = None
) -> Axes:
    """Agreement beyond chance by layer: a line for all tasks at once and one per pair, their intervals as bands.

    Args:
        rows: a stage's `agreement`, of which the rows of kind `all` are drawn.
        watershed: a stage's `watershed`, marked if it has a layer.
        pairs: the pairs to name; default: all if there are at most six, else the two extremes. The others are grey, or
            left out if there are more than twelve tasks.
    """
    lines = lines_of(rows, "all")
    if not lines:
        return _nothing(ax, "one task: no agreement to show")
    everyone = together(lines)
    named = [pair for pair in (named_pairs(lines) if pairs is None else pairs) if pair in lines and pair != everyone]
    rest = [pair for pair in lines if pair not in named and pair != everyone]
    ax.axhline(0, color=MUTED, linestyle="--", linewidth=1.2, label="chance")
    if len(everyone) <= TASKS_UP_TO:
        for i, pair in enumerate(rest):
            x, y = _line(lines[pair], "beyond_chance")
            ax.plot(x, y, color=BAND, linewidth=0.8, zorder=1.5, label="_" if i else "other pairs")
    for i, pair in enumerate(named):
        x, y = _line(lines[pair], "beyond_chance")
        ax.plot(x, y, **_style(i), label=" + ".join(short(t) for t in pair))
        if len(named) <= BANDS_UP_TO:
            _band(ax, lines[pair], _style(i)["color"])
    label = " + ".join(short(t) for t in everyone) if len(everyone) == 2 else f"all {len(everyone)} tasks at once"
    ax.plot(*_line(lines[everyone], "beyond_chance"), color=INK, linewidth=2.6, marker="o", label=label)
    _band(ax, lines[everyone], MUTED)
    if watershed and watershed["layer"] is not None:
        low, high = watershed["low"], watershed["high"]
        if low is not None and high is not None and low < high:
            ax.axvspan(low, high, color=BAND, alpha=0.4, linewidth=0)
        ax.axvline(watershed["layer"], color=INK, linestyle="-.", linewidth=1.4, label="watershed")
    ax.set(xlabel="layer (0 is the first)", ylabel="agreement beyond chance")
    ax.set_ylim(top=max(1.0, ax.get_ylim()[1]))
    return _legend(_layers(ax, [row["layer"] for row in lines[everyone]]))


def plot_agreement_by_kind(rows: Sequence[Mapping], ax: Axes, limit: float | None = None) -> Axes:
    """Heat map of all tasks' agreement beyond chance, layers by kinds of matrices; `limit` ends the colour scale."""
    kinds = kind_names(rows)
    lines = {kind: lines_of(rows, kind) for kind in kinds}
    kinds = [kind for kind in kinds if lines[kind]]
    if not kinds:
        return _nothing(ax, "one task: no agreement to show")
    cells = {
        kind: {r["layer"]: number(r["beyond_chance"]) for r in lines[kind][together(lines[kind])]} for kind in kinds
    }
    layers = sorted({layer for column in cells.values() for layer in column})
    values = np.array([[cells[kind].get(layer, math.nan) for kind in kinds] for layer in layers])
    _heat(
        ax,
        values,
        layers,
        [short(kind, 16) for kind in kinds],
        "agreement beyond chance",
        limit,
        diverging=bool(np.nanmin(values, initial=0) < -0.1),
    )
    ax.set_ylabel("layer (0 is the first)")
    return ax


def plot_affinity(
    matrix: Sequence[Sequence[float]],
    tasks: Sequence[str],
    ax: Axes,
    label: str = "affinity",
    limit: float | None = None,
    diverging: bool = False,
) -> Axes:
    """Heat map of a tasks x tasks matrix; the diagonal, 1 by definition, stays empty. `limit` ends the colour scale."""
    if not several(tasks):
        return _nothing(ax, "one task: no other to compare with")
    values = np.array([[number(v) for v in row] for row in matrix], dtype=float)
    np.fill_diagonal(values, math.nan)
    ax.set_facecolor(GRID)
    names = [short(task, 16) for task in tasks] if len(tasks) <= NAMES_UP_TO else None
    _heat(ax, values, names, names, label, limit, diverging)
    if names is None:
        ax.set(xlabel="task", ylabel="task")
    return ax


def plot_keepers(layers: Sequence[int], kept_by: Sequence[Sequence[float]], ax: Axes, what: str = "weights") -> Axes:
    """Stacked bars per layer: the share that no task keeps, one task, ..., all tasks.

    Args:
        kept_by: (layers, tasks + 1), the share by number of tasks, from 0 to all.
        what: what is counted, for the axis label.
    """
    shares = np.array([[number(v) for v in row] for row in kept_by], dtype=float).reshape(len(layers), -1)
    groups = _groups(shares.shape[1] - 1)
    bottom = np.zeros(len(layers))
    for i, (label, low, high) in enumerate(groups):
        height = shares[:, low : high + 1].sum(axis=1)
        colour = GRID if low == 0 else colormaps["viridis"](0.95 - 0.6 * (i - 1) / max(1, len(groups) - 2))
        ax.bar(layers, height, 0.82, bottom=bottom, color=colour, label=label, edgecolor=PAPER, linewidth=0.5)
        bottom += height
    ax.set(xlabel="layer (0 is the first)", ylabel=f"share of the {what}", ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(False, axis="x")
    return _legend(_layers(ax, layers, pad=0.6))


def plot_heads(parts: Sequence[Mapping], tasks: Sequence[str], ax: Axes) -> Axes:
    """Heads (down, layer by layer) by tasks: filled where the task's own mask keeps the head, coloured by who else does."""
    layers = sorted((part for part in parts if part["granularity"] == "head"), key=lambda part: part["layer"])
    rows = [set(names) for part in layers for names in part["heads"]]
    grid = np.array([[0 if t not in kept else _company(kept, tasks) for t in tasks] for kept in rows], dtype=float)
    grid = np.where(grid == 0, math.nan, grid).reshape(len(rows), len(tasks))
    small = len(rows) > 200 or len(tasks) > NAMES_UP_TO
    edges = {"linewidth": 0} if small else {"edgecolor": PAPER, "linewidth": 0.6}
    x, y = np.arange(len(tasks) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
    ax.pcolormesh(x, y, grid, cmap=ListedColormap(list(KEPT_BY.values())), vmin=1, vmax=3, rasterized=small, **edges)
    starts = np.cumsum([0, *(len(part["heads"]) for part in layers)])
    for start in starts[1:-1]:
        ax.axhline(start - 0.5, color=BAND, linewidth=0.6)
    step = math.ceil(len(layers) / 24)
    ax.set_yticks([(a + b - 1) / 2 for a, b in itertools.pairwise(starts)][::step])
    ax.set_yticklabels([str(part["layer"]) for part in layers][::step])
    ax.set(ylim=(len(rows) - 0.5, -0.5), ylabel="layer (one row per head)")
    ax.tick_params(length=0)
    ax.grid(False)
    if len(tasks) <= NAMES_UP_TO:
        _columns(ax, [short(task, 16) for task in tasks])
    else:
        ax.set_xlabel("task")
    wanted = KEPT_BY if several(tasks) else {"kept by the task": INK}
    return _legend(ax, [Patch(color=colour) for colour in wanted.values()], list(wanted))


def _company(kept: set[str], tasks: Sequence[str]) -> int:
    """How many keep the head: 3 for all tasks, 1 for one alone, else 2."""
    return 3 if len(kept) == len(tasks) else 1 if len(kept) == 1 else 2


def plot_cost_curve(curve: Mapping, ax: Axes, metric: str = "metric (points)") -> Axes:
    """Metric against sparsity, one colour per task, the average in ink; one-shot dashed, recovered solid, knees ringed."""
    points = sorted(curve["points"], key=lambda point: point["sparsity"])
    tasks = list(dict.fromkeys(task for point in points for task in point["metrics"]))
    named = named_tasks(curve)
    series: list[tuple[str | None, dict]] = []
    if len(tasks) <= TASKS_UP_TO:
        series += [(task, {"color": BAND, "linewidth": 0.8}) for task in tasks if task not in named]
    series += [(task, _style(i)) for i, task in enumerate(named)]
    if several(tasks) or not tasks:
        series.append((None, {"color": INK, "linewidth": 2.6, "marker": "o"}))
    for task, style in series:
        for recovered in (False, True):
            some = [p for p in points if p["recovered"] is recovered]
            y = [number(p["average"] if task is None else p["metrics"].get(task)) for p in some]
            label = "average" if task is None else short(task) if task in named else "_"
            ax.plot(
                *([p["sparsity"] for p in some], y),
                **style | ({} if recovered else {"linestyle": "--", "markerfacecolor": PAPER}),
                label=label + (", recovered" if recovered else ", one-shot") if some else "_",
            )
        knee = (curve["knee"] or {}).get(task or "average")
        at = [p for p in points if p["sparsity"] == knee]
        if at and (task is None or task in named):
            best = max(at, key=lambda p: p["recovered"])
            y = number(best["average"] if task is None else best["metrics"].get(task))
            ax.plot([knee], [y], "o", markersize=13, fillstyle="none", color=style["color"], label="_knee")
    ax.set(xlabel="pruned, of the prunable weights", ylabel=metric)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    return _legend(ax)


def plot_footprint(rows: Sequence[Mapping], ax: Axes, quantity: str = "parameters") -> Axes:
    """Horizontal bars by module, before and after. `quantity`: `parameters`, `bytes` or `multiplications`.

    If there are more than twenty modules, the smallest are drawn as one.
    """
    before, after = FOOTPRINT[quantity]
    shown = list(rows)
    if len(shown) > MODULES_UP_TO:
        largest = sorted(shown, key=lambda row: row[before], reverse=True)[: MODULES_UP_TO - 1]
        others = [row for row in shown if row not in largest]
        sums = {key: sum(row[key] for row in others) for key in (before, after)}
        shown = [*(row for row in shown if row in largest), {"module": f"{len(others)} others", **sums}]
    y = np.arange(len(shown))
    ax.barh(y - 0.2, [row[before] for row in shown], 0.38, color=BAND, label="before")
    ax.barh(y + 0.2, [row[after] for row in shown], 0.38, color=COLOURS[0], label="after")
    ax.set_yticks(y, [short(row["module"], 26) for row in shown])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlabel({"multiplications": "multiplications per token"}.get(quantity, quantity))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(False, axis="y")
    return _legend(ax)


def plot_comparison(rows: Sequence[Mapping], ax: Axes) -> Axes:
    """Average against sparsity, one line per method and criterion, standard deviations over seeds as error bars.

    Args:
        rows: of `compare.json`; the dense row becomes a horizontal line, its standard deviation a band.
    """
    dense = next((row for row in rows if row["method"] == "dense"), None)
    if dense is not None:
        value, spread = dense["mean"]["average"], dense["spread"]["average"]
        ax.axhline(value, color=INK, linestyle="--", linewidth=1.4, label="dense")
        if spread:
            ax.axhspan(value - spread, value + spread, color=BAND, alpha=0.3, linewidth=0)
    lines: dict[str, list[Mapping]] = {}
    for row in rows:
        if row is not dense:
            lines.setdefault(method_name(row), []).append(row)
    levels = sorted({row["sparsity"] for some in lines.values() for row in some})
    gap = min((b - a for a, b in itertools.pairwise(levels)), default=0.1)
    for i, (name, some) in enumerate(lines.items()):
        some = sorted(some, key=lambda row: row["sparsity"])
        aside = gap * 0.2 * ((i + 0.5) / len(lines) - 0.5)  # side by side, so that error bars do not hide each other
        ax.errorbar(
            [row["sparsity"] + aside for row in some],
            [row["mean"]["average"] for row in some],
            [row["spread"]["average"] or 0 for row in some],
            **_style(i),
            linestyle=["-", "--", ":"][i // len(COLOURS) % 3],
            markerfacecolor=_style(i)["color"] if i < len(COLOURS) else PAPER,
            capsize=3,
            label=short(name, 30),
        )
    ax.set(xlabel="pruned, of the prunable weights", ylabel="average of the tasks' metrics (points)")
    if levels:
        ax.set_xticks(levels)
        ax.set_xlim(levels[0] - 0.4 * gap, levels[-1] + 0.4 * gap)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0 if all(100 * v % 1 < 1e-6 for v in levels) else 1))
    return _legend(ax)


# Pieces


def _nothing(ax: Axes, sentence: str) -> Axes:
    """A sentence in place of a plot."""
    ax.text(0.5, 0.5, sentence, ha="center", va="center", color=MUTED, transform=ax.transAxes)
    ax.set_axis_off()
    return ax


def _style(i: int) -> dict[str, str]:
    """Colour and marker of the i-th line."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def _line(rows: Sequence[Mapping], key: str) -> tuple[list[int], list[float]]:
    """The layers and the values of one line."""
    return [row["layer"] for row in rows], [number(row[key]) for row in rows]


def _band(ax: Axes, rows: Sequence[Mapping], colour: Any) -> None:
    """The intervals of a line, shaded."""
    x = [row["layer"] for row in rows]
    low, high = ([number(row[key]) for row in rows] for key in ("low", "high"))
    ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _layers(ax: Axes, layers: Sequence[int], pad: float = 0.35) -> Axes:
    """Ticks at whole numbers only, and room for the markers at either end."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    if layers:
        ax.set_xlim(min(layers) - pad, max(layers) + pad)
    return ax


def _groups(tasks: int) -> list[tuple[str, int, int]]:
    """(label, fewest, most tasks) per piece of a stacked bar: one per number of tasks, ranges if there are many."""
    if tasks <= 7:
        middle = [(f"{n} task{'s' * (n > 1)}", n, n) for n in range(1, tasks)]
    else:
        edges = sorted({2, *(round(2 + (tasks - 2) * part / 4) for part in (1, 2, 3, 4))})
        ranges = [(a, b - 1) for a, b in itertools.pairwise(edges)]
        middle = [("1 task", 1, 1), *((f"{a} tasks" if a == b else f"{a} to {b} tasks", a, b) for a, b in ranges)]
    return [("no task", 0, 0), *middle, (f"all {tasks} tasks" if tasks > 1 else "the task", tasks, tasks)]


def _heat(ax: Axes, values: np.ndarray, rows, columns, label: str, limit: float | None, diverging: bool) -> None:
    """A heat map with its colour scale; up to 24 x 8 cells show their numbers. `rows`, `columns`: names, None for no names."""
    finite = values[np.isfinite(values)]
    limit = limit or (float(np.abs(finite).max()) if finite.size else 1.0) or 1.0
    colours = colormaps["PuOr" if diverging else "cividis"]
    low = -limit if diverging else 0.0
    small = values.size > 2_500
    x, y = np.arange(values.shape[1] + 1) - 0.5, np.arange(values.shape[0] + 1) - 0.5
    edges = {"linewidth": 0} if small else {"edgecolor": PAPER, "linewidth": 0.8}
    mesh = ax.pcolormesh(x, y, values, cmap=colours, vmin=low, vmax=limit, rasterized=small, **edges)
    ax.set_ylim(values.shape[0] - 0.5, -0.5)
    ax.figure.colorbar(mesh, ax=ax, label=label, shrink=0.9, pad=0.02)
    ax.grid(False)
    ax.tick_params(length=0)
    if columns is not None:
        _columns(ax, columns)
    if rows is not None:
        step = math.ceil(len(rows) / 24)
        ax.set_yticks(range(0, len(rows), step), [str(row) for row in rows][::step])
    if values.shape[1] <= 8 and values.shape[0] <= 24:
        for (i, j), value in np.ndenumerate(values):
            if math.isfinite(value):
                red, green, blue, _ = colours((value - low) / (limit - low))
                ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)


def _columns(ax: Axes, names: Sequence[Any]) -> None:
    """Names along the x axis, turned by 45 degrees if they are long."""
    names = [str(name) for name in names]
    turned = max(map(len, names), default=0) * len(names) > 24
    ax.set_xticks(range(len(names)), names, rotation=45 if turned else 0, ha="right" if turned else "center")
    if turned:
        for label in ax.get_xticklabels():
            label.set_rotation_mode("anchor")


def _legend(ax: Axes, handles=None, labels=None) -> Axes:
    """A legend below the axes, in as many columns as fit there."""
    if handles is None:
        handles, labels = ax.get_legend_handles_labels()
    if handles:
        wide = ax.get_position().width * ax.figure.get_figwidth() * 72
        columns = max(1, int(wide / (7 * max(map(len, labels)) + 40)))
        ax.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)
    return ax
