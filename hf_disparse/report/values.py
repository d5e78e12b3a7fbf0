"""Which numbers of an analysis a figure, its sentence and its table show, in plain Python."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

TASKS_UP_TO = 12  # with more tasks, only the extremes are drawn and tabulated
NAMES_UP_TO = 24  # with more tasks, axes have no names
PAIRS_UP_TO = 6  # with more pairs or tasks, only the extremes have a colour and a name
BANDS_UP_TO = 3  # with more named pairs, their intervals are not drawn
STAGES = {"before training": "before training", "dense": "after dense training", "sparse": "after sparse training"}

Pair = tuple[str, ...]


def number(value: float | None) -> float:
    """The value as a float, NaN for None."""
    return math.nan if value is None else float(value)


def mean_of(values: Iterable[float | None]) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = [number(v) for v in values if math.isfinite(number(v))]
    return fmean(finite) if finite else math.nan


def stage_name(stage: Mapping) -> str:
    """The name of a stage in figures, such as "after dense training"."""
    return STAGES.get(stage["name"], stage["name"])


def method_name(row: Mapping) -> str:
    """The name of a comparison's row in tables and figures: method and criterion."""
    return f"{row['method']} {row['criterion']}".rstrip()


def several(tasks: Sequence) -> bool:
    """Whether there are at least two tasks to compare."""
    return len(tasks) > 1


def short(name: Any, length: int = 22) -> str:
    """A name that matplotlib draws literally: no mathematics, hidden label or line break, at most `length` characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(name))
    if len(text) > length:
        text = text[: length // 2] + "…" + text[len(text) - (length - length // 2 - 1) :]
    text = text.replace("$", r"\$")
    return "\N{THIN SPACE}" + text if text.startswith("_") else text


def lines_of(rows: Sequence[Mapping], kind: str) -> dict[Pair, list[Mapping]]:
    """Tasks -> their rows of this kind of matrix, from the first layer to the last; single tasks are left out."""
    lines: dict[Pair, list[Mapping]] = {}
    some = [row for row in rows if row["kind"] == kind and several(row["tasks"])]
    for row in sorted(some, key=lambda row: row["layer"]):
        lines.setdefault(tuple(row["tasks"]), []).append(row)
    return lines


def together(lines: Mapping[Pair, Any]) -> Pair:
    """The key of the line of all tasks."""
    return max(lines, key=len)


def kind_names(rows: Sequence[Mapping]) -> list[str]:
    """The kinds of matrices, in order, without `all`."""
    return list(dict.fromkeys(row["kind"] for row in rows if row["kind"] != "all"))


def extremes(values: Mapping[Any, float]) -> list[Any]:
    """The keys of the lowest and the highest finite value; one if they are the same, [] if there are none."""
    known = {key: value for key, value in values.items() if math.isfinite(value)}
    return list(dict.fromkeys([min(known, key=known.__getitem__), max(known, key=known.__getitem__)])) if known else []


def named_pairs(lines: Mapping[Pair, Sequence[Mapping]]) -> list[Pair]:
    """The pairs whose lines get a colour and a name: all if at most six, else those that agree least and most."""
    everyone = together(lines)
    pairs = [pair for pair in lines if pair != everyone]
    if len(pairs) <= PAIRS_UP_TO:
        return pairs
    return extremes({pair: mean_of(row["beyond_chance"] for row in lines[pair]) for pair in pairs})


def shown_pairs(lines: Mapping[Pair, Sequence[Mapping]], named: Sequence[Pair]) -> list[Pair]:
    """The lines to show: all tasks first, then the pairs; with more than twelve tasks only the named pairs."""
    everyone = together(lines)
    if len(everyone) > TASKS_UP_TO:
        return [everyone, *(pair for pair in named if pair in lines and pair != everyone)]
    return [everyone, *(pair for pair in lines if pair != everyone)]


def curve_tasks(curve: Mapping) -> list[str]:
    """The tasks of a cost curve, in their order."""
    return list(dict.fromkeys(task for point in curve["points"] for task in point["metrics"]))


def named_tasks(curve: Mapping) -> list[str]:
    """The tasks whose curves get a colour and a name: all if at most six, else those that lose least and most."""
    tasks = curve_tasks(curve)
    return tasks if len(tasks) <= PAIRS_UP_TO else extremes({task: loss(curve, task) for task in tasks})


def loss(curve: Mapping, task: str) -> float:
    """Points that the task loses from the lowest to the highest sparsity, after recovery if it was measured."""
    points = curve["points"]
    recovered = any(point["recovered"] for point in points)
    some = sorted((p for p in points if p["recovered"] is recovered), key=lambda point: point["sparsity"])
    values = [number(p["metrics"].get(task)) for p in some]
    values = [value for value in values if math.isfinite(value)]
    return values[0] - values[-1] if values else math.nan


def whole_layers(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows of whole layers (kind `all`) among the keepers, by layer; [] if there are only single matrices."""
    return sorted((row for row in rows if row["kind"] == "all"), key=lambda row: row["layer"])


def off_diagonal(matrix: Sequence[Sequence[float]]) -> dict[tuple[int, int], float]:
    """(i, j) with i < j -> the value of that pair."""
    size = range(len(matrix))
    return {(i, j): number(matrix[i][j]) for i in size for j in size if i < j}


def blocks(rows: Sequence[Mapping]) -> list[dict[str, Any]]:
    """Sums a footprint's modules by layer; modules outside layers by the first two parts of their names."""
    sums: dict[str, dict[str, Any]] = {}
    for row in rows:
        inside = re.search(r"(?:^|\.)(\d+)(?:\.|$)", row["module"])
        name = f"layer {inside[1]}" if inside else ".".join(row["module"].split(".")[:2])
        block = sums.setdefault(name, {"module": name})
        for key, value in row.items():
            if key != "module":
                block[key] = block.get(key, 0) + value
    return list(sums.values())


SPEED_HEADER = ("measured", "dense", "sped up", "gain")


def speed_rows(speed: Mapping) -> list[tuple[str, float, float | None, float | None]]:
    """The rows of a table of `results.json`'s `speed`: what, dense, sped up, and their ratio; None where it is not sped up."""
    named = {
        f"milliseconds, {texts} text{'s' * (texts != '1')}": value for texts, value in speed["milliseconds"].items()
    }
    named["megabytes in memory"] = speed["megabytes"]
    # A compact model gains in plain torch, too, where it cannot be sped up.
    best = {name: value.get("fast", value.get("compact")) for name, value in named.items()}
    gains = {name: value["dense"] / best[name] for name, value in named.items() if best[name]}
    return [(name, value["dense"], best[name], gains.get(name)) for name, value in named.items()]


def speed_cells(speed: Mapping) -> list[tuple[str, ...]]:
    """The rows of `speed_rows` as text; a gain of 3.7 is "3.7x"."""
    shown = [(name, *("" if x is None else f"{x:.1f}" for x in values)) for name, *values in speed_rows(speed)]
    return [(*cells, gain and f"{gain}x") for *cells, gain in shown]
