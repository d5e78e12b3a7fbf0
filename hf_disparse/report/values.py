"""What a figure, its sentence and its table show of an analysis, in plain Python. Layer 7."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

TASKS_UP_TO = 12  # of more tasks only the extremes are drawn and tabulated
NAMES_UP_TO = 24  # of more tasks no name is written along an axis
PAIRS_UP_TO = 6
BANDS_UP_TO = 3
STAGES = {"before training": "before training", "dense": "after dense training", "sparse": "after sparse training"}

Pair = tuple[str, ...]


def number(value: float | None) -> float:
    """The value, NaN for none."""
    return math.nan if value is None else float(value)


def mean_of(values: Iterable[float | None]) -> float:
    """The mean of those that are numbers; NaN for none."""
    finite = [number(v) for v in values if math.isfinite(number(v))]
    return fmean(finite) if finite else math.nan


def stage_name(stage: Mapping) -> str:
    """A stage as figures call it."""
    return STAGES.get(stage["name"], stage["name"])


def method_name(row: Mapping) -> str:
    """A row of a comparison as tables and figures call it."""
    return f"{row['method']} {row['criterion']}".rstrip()


def several(tasks: Sequence) -> bool:
    """Whether there is anything to compare."""
    return len(tasks) > 1


def short(name: Any, length: int = 22) -> str:
    """A name as matplotlib shows it as it is: no mathematics, no hidden label, no line break, not too long."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(name))
    if len(text) > length:
        text = text[: length // 2] + "…" + text[len(text) - (length - length // 2 - 1) :]
    text = text.replace("$", r"\$")
    return "\N{THIN SPACE}" + text if text.startswith("_") else text


def lines_of(rows: Sequence[Mapping], kind: str) -> dict[Pair, list[Mapping]]:
    """Tasks -> their rows of this matrix kind, first layer to last; without those of a single task."""
    lines: dict[Pair, list[Mapping]] = {}
    some = [row for row in rows if row["kind"] == kind and several(row["tasks"])]
    for row in sorted(some, key=lambda row: row["layer"]):
        lines.setdefault(tuple(row["tasks"]), []).append(row)
    return lines


def together(lines: Mapping[Pair, Any]) -> Pair:
    """The tasks of the line of all of them."""
    return max(lines, key=len)


def kind_names(rows: Sequence[Mapping]) -> list[str]:
    """The matrix kinds in their order, `all` not among them."""
    return list(dict.fromkeys(row["kind"] for row in rows if row["kind"] != "all"))


def extremes(values: Mapping[Any, float]) -> list[Any]:
    """The keys of the lowest and of the highest value (fewer if there are fewer)."""
    known = {key: value for key, value in values.items() if math.isfinite(value)}
    return list(dict.fromkeys([min(known, key=known.__getitem__), max(known, key=known.__getitem__)])) if known else []


def named_pairs(lines: Mapping[Pair, Sequence[Mapping]]) -> list[Pair]:
    """The pairs whose lines get a colour and a name: all of up to six, else the two that agree least and most."""
    everyone = together(lines)
    pairs = [pair for pair in lines if pair != everyone]
    if len(pairs) <= PAIRS_UP_TO:
        return pairs
    return extremes({pair: mean_of(row["beyond_chance"] for row in lines[pair]) for pair in pairs})


def shown_pairs(lines: Mapping[Pair, Sequence[Mapping]], named: Sequence[Pair]) -> list[Pair]:
    """The lines of the figure: all tasks at once first, then the pairs, of more than twelve tasks only those named."""
    everyone = together(lines)
    if len(everyone) > TASKS_UP_TO:
        return [everyone, *(pair for pair in named if pair in lines and pair != everyone)]
    return [everyone, *(pair for pair in lines if pair != everyone)]


def curve_tasks(curve: Mapping) -> list[str]:
    """The tasks of a cost curve, in their order."""
    return list(dict.fromkeys(task for point in curve["points"] for task in point["metrics"]))


def named_tasks(curve: Mapping) -> list[str]:
    """The tasks whose curves get a colour: all of up to six, else the two that lose least and most."""
    tasks = curve_tasks(curve)
    return tasks if len(tasks) <= PAIRS_UP_TO else extremes({task: loss(curve, task) for task in tasks})


def loss(curve: Mapping, task: str) -> float:
    """Points that the task loses from the lowest to the highest sparsity; the recovered if there are any."""
    points = curve["points"]
    recovered = any(point["recovered"] for point in points)
    some = sorted((p for p in points if p["recovered"] is recovered), key=lambda point: point["sparsity"])
    values = [number(p["metrics"].get(task)) for p in some]
    values = [value for value in values if math.isfinite(value)]
    return values[0] - values[-1] if values else math.nan


def whole_layers(rows: Sequence[Mapping]) -> list[Mapping]:
    """The keepers' rows of whole layers (kind `all`), by layer; none if there are only rows of single matrices."""
    return sorted((row for row in rows if row["kind"] == "all"), key=lambda row: row["layer"])


def off_diagonal(matrix: Sequence[Sequence[float]]) -> dict[tuple[int, int], float]:
    """(i, j), i < j -> the value of that pair."""
    size = range(len(matrix))
    return {(i, j): number(matrix[i][j]) for i in size for j in size if i < j}


def blocks(rows: Sequence[Mapping]) -> list[dict[str, Any]]:
    """A footprint's modules summed by layer, and those outside of layers by the first two parts of their names."""
    sums: dict[str, dict[str, Any]] = {}
    for row in rows:
        inside = re.search(r"(?:^|\.)(\d+)(?:\.|$)", row["module"])
        name = f"layer {inside[1]}" if inside else ".".join(row["module"].split(".")[:2])
        block = sums.setdefault(name, {"module": name})
        for key, value in row.items():
            if key != "module":
                block[key] = block.get(key, 0) + value
    return list(sums.values())
