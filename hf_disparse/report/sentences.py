"""One sentence or two per figure that say what is to be seen in it, made from its numbers. Layer 7.

Where nothing is to be seen they say so: no difference within its interval is told as a finding.
"""

import math
from collections.abc import Mapping, Sequence

from hf_disparse.report.values import (
    curve_tasks,
    extremes,
    kind_names,
    lines_of,
    loss,
    mean_of,
    method_name,
    number,
    off_diagonal,
    several,
    stage_name,
    together,
)

ONE_TASK = "One task was analysed: there is no other to agree or disagree with."


def agreement(stages: Sequence[Mapping]) -> str:
    """Where all tasks agree most and least at the last stage, and the watersheds of all stages."""
    last = stages[-1]
    lines = lines_of(last["agreement"], "all")
    if not lines:
        return ONE_TASK
    rows, when = lines[together(lines)], _when(last)
    who = "both tasks" if len(together(lines)) == 2 else f"all {len(together(lines))} tasks"
    intervals = [row for row in rows if row["low"] is not None and row["high"] is not None]
    if intervals and len(intervals) == len(rows) and all(row["low"] <= 0 <= row["high"] for row in rows):
        told = f"{when}, no layer's agreement of {who} differs from chance: every interval holds 0."
    else:
        least, most = (pick(rows, key=lambda row: row["beyond_chance"]) for pick in (min, max))
        told = f"{when}, {who} agree most in layer {most['layer']} ({_value(most)})"
        told += f" and least in layer {least['layer']} ({_value(least)})." if least is not most else "."
        if least is not most and None not in (most["low"], least["high"]) and most["low"] <= least["high"]:
            told += " Their intervals overlap, so the layers may not differ."
    return f"{told} {watersheds(stages)}"


def watersheds(stages: Sequence[Mapping]) -> str:
    """Where agreement falls for good, stage by stage."""
    found = [stage for stage in stages if stage["watershed"]["layer"] is not None]
    if not found:
        return (
            "No stage has a watershed: agreement never falls for good." if len(stages) > 1 else "There is no watershed."
        )
    where: dict[str, list[str]] = {}
    for stage in found:
        mark = stage["watershed"]
        told = f"layer {mark['layer']}"
        if mark["low"] is not None and mark["high"] is not None and mark["low"] < mark["high"]:
            told += f" ({mark['low']} to {mark['high']})"
        told += f", in {_percent(mark['share'])} of the bootstrap samples"
        where.setdefault(told, []).append(stage_name(stage))
    told = [f"{' and '.join(names)} it is {place}" for place, names in where.items()]
    rest = [stage_name(stage) for stage in stages if stage not in found]
    told += [f"{' and '.join(rest)} there is none"] if rest else []
    return f"The watershed, where agreement falls for good: {'; '.join(told)}."


def agreement_by_kind(stages: Sequence[Mapping]) -> str:
    """Which kinds of matrices tasks share most and least at the last stage."""
    last = stages[-1]
    means, widths = {}, []
    for kind in kind_names(last["agreement"]):
        lines = lines_of(last["agreement"], kind)
        if lines:
            rows = lines[together(lines)]
            means[kind] = mean_of(row["beyond_chance"] for row in rows)
            widths += [row["high"] - row["low"] for row in rows if None not in (row["high"], row["low"])]
    ends = extremes(means)
    if len(ends) < 2:
        return f"{_when(last)}, there are not two kinds of matrices to compare."
    low, high = ends
    told = f"{_when(last)}, on the mean of all layers, tasks share {high} most ({means[high]:.2f}) and {low} least ({means[low]:.2f})"
    if widths and means[high] - means[low] < mean_of(widths):
        return told + ", a difference smaller than a single cell's interval: do not read much into it."
    return told + "."


def affinity(stage: Mapping, tasks: Sequence[str]) -> str:
    """Which two tasks are most and least alike, and how many pairs pull against each other."""
    if not several(tasks):
        return ONE_TASK
    told = []
    for key, most in (
        ("importance", "share most of what matters to them"),
        ("gradient_cosine", "have the gradients most alike"),
    ):
        values = off_diagonal(stage["affinity"][key])
        ends = extremes(values)
        if not ends:
            told.append("There is no number to compare.")
        elif len(ends) == 1:
            told.append(f"{_both(tasks, ends[0])}: {key.replace('_', ' ')} {values[ends[0]]:.2f}.")
        else:
            low, high = ends
            told.append(
                f"{_both(tasks, high)} {most} ({values[high]:.2f}), {_both(tasks, low)} least ({values[low]:.2f})."
            )
    values = [v for v in off_diagonal(stage["affinity"]["gradient_cosine"]).values() if math.isfinite(v)]
    against = sum(value < 0 for value in values)
    if values:
        total = len(values)
        told.append(
            f"The gradients of {against} of {total} pairs point against each other."
            if against
            else f"{'No two tasks' if total > 1 else 'The two tasks do not'} have gradients that point against each other."
        )
    return f"{_when(stage)}: " + " ".join(told)


def keepers(stage: Mapping, layers: Sequence[int], kept_by: Sequence[Sequence[float]], what: str) -> str:
    """Of the share that one task alone keeps and of what all keep."""
    tasks = len(kept_by[0]) - 1
    if tasks < 2:
        share = mean_of(row[-1] for row in kept_by)
        return f"{_when(stage)}, the task keeps {_percent(share)} of the {what}; there is no other task."
    alone = {layer: number(row[1]) for layer, row in zip(layers, kept_by, strict=True)}
    everyone = mean_of(row[-1] for row in kept_by)
    told = f"{_when(stage)}, on the mean of all layers, all tasks keep {_percent(everyone)} of the {what} and "
    told += f"one task alone keeps {_percent(mean_of(alone.values()))}"
    ends = extremes(alone)
    if len(ends) == 2 and _percent(alone[ends[0]]) != _percent(alone[ends[1]]):
        low, high = ends
        told += f", most in layer {high} ({_percent(alone[high])}), least in layer {low} ({_percent(alone[low])})"
    elif len(layers) > 1:
        told += ", the same in every layer"
    return told + "."


def keepers_by_kind(alone: Mapping[str, float], tasks: Sequence[str]) -> str:
    """Of which kind of matrix one task alone keeps most and least: kind -> that share, on the mean of all layers."""
    what = "one task alone keeps" if several(tasks) else "the task keeps"
    low, high = min(alone, key=alone.__getitem__), max(alone, key=alone.__getitem__)
    least, most = (f"{100 * alone[kind]:.0f} %" for kind in (low, high))
    if least == most:
        return f"Of every kind of matrix {what} the same share ({most}): there is no difference to see."
    return f"On the mean of all layers {what} most of {high} ({most}) and least of {low} ({least})."


def heads(stage: Mapping, tasks: Sequence[str]) -> str:
    """How many heads serve all tasks, one alone or none, and who has most of its own."""
    rows = [set(names) for part in stage["parts"] if part["granularity"] == "head" for names in part["heads"]]
    if not rows:
        return "No head was scored."
    if not several(tasks):
        return f"{_when(stage)}, the task keeps {sum(map(len, rows))} of {len(rows)} heads."
    sizes = [len(row) for row in rows]
    told = (
        f"{_when(stage)}, of {len(rows)} heads {sizes.count(len(tasks))} are kept for all tasks, {sizes.count(1)} for "
        f"one task alone and {sizes.count(0)} for none."
    )
    alone = {task: sum(row == {task} for row in rows) for task in tasks}
    most = max(alone, key=alone.__getitem__)
    if alone[most] and list(alone.values()).count(alone[most]) == 1:
        told += f" {most} has most heads of its own ({alone[most]})."
    return told


def cost_curve(curve: Mapping) -> str:
    """The knee, what stays within the points asked for, who loses most and what training on recovers."""
    tasks, knee = curve_tasks(curve), curve["knee"] or {}
    told = []
    at = knee.get("average")
    told.append(f"The average has its knee at {_percent(at)} pruned." if at is not None else "The average has no knee.")
    within = curve.get("within")
    if within:
        reach = within["sparsity"]
        told.append(
            f"At every sparsity that was tried some task loses more than {within['points']:g} points."
            if reach is None
            else f"No task loses more than {within['points']:g} points up to {_percent(reach)}."
        )
    if several(tasks):
        losses = {task: loss(curve, task) for task in tasks}
        ends = extremes(losses)
        if len(ends) == 2:
            low, high = ends
            told.append(
                f"From the lowest to the highest sparsity {high} loses most ({losses[high]:.1f} points), {low} least ({losses[low]:.1f})."
            )
    pairs: dict[float, dict[bool, float]] = {}
    for point in curve["points"]:
        pairs.setdefault(point["sparsity"], {})[point["recovered"]] = point["average"]
    both = [at for at, values in pairs.items() if len(values) == 2]
    if both:
        gain = pairs[max(both)][True] - pairs[max(both)][False]
        told.append(f"At {_percent(max(both))} training on recovers {gain:+.1f} points of the average.")
    return " ".join(told)


def footprint(rows: Sequence[Mapping]) -> str:
    """What is left of parameters, bytes and multiplications, and where most of it is."""

    def total(key: str) -> int:
        return sum(row[key] for row in rows)

    if not total("parameters"):
        return "There is nothing to count."
    left = total("nonzeros")
    told = f"Of {total('parameters'):,} parameters {left:,} are not zero ({_percent(left / total('parameters'))})"
    if total("bytes_dense"):
        told += f", which take {_percent(total('bytes_packed') / total('bytes_dense'))} of the bytes"
    if total("multiplications"):
        told += f" and {_percent(total('multiplications_left') / total('multiplications'))} of the multiplications"
    most = max(rows, key=lambda row: row["nonzeros"])
    return told + f". {most['module']} holds most of what is left ({_percent(most['nonzeros'] / max(1, left))})."


def comparison(rows: Sequence[Mapping]) -> str:
    """The best method at the highest sparsity, and whether its lead may be chance."""
    pruned = [row for row in rows if row["method"] != "dense"]
    if not pruned:
        return "Only the dense model was trained: there is nothing to compare it with."
    top = max(row["sparsity"] for row in pruned)
    there = sorted((r for r in pruned if r["sparsity"] == top), key=lambda r: r["mean"]["average"], reverse=True)
    best = there[0]
    told = f"At {_percent(top)} pruned {method_name(best)} has the highest average ({best['mean']['average']:.1f})"
    if best["against_dense"] is not None:  # of the seeds that both have
        told += f", {best['against_dense']:+.1f} points against dense"
    told += "."
    if len(there) > 1:
        second = there[1]
        lead = best["mean"]["average"] - second["mean"]["average"]
        spreads = [row["spread"]["average"] for row in (best, second)]
        told += f" It leads {method_name(second)} by {lead:.1f} points"
        if None in spreads:
            told += ", of one seed each: that may be chance."
        elif lead <= max(spreads):
            told += ", less than a standard deviation over seeds: that may be chance."
        else:
            told += ", more than a standard deviation over seeds."
    return told


# Pieces


def _when(stage: Mapping) -> str:
    name = stage_name(stage)
    return name[:1].upper() + name[1:]


def _value(row: Mapping) -> str:
    told = f"{row['beyond_chance']:.2f}"
    return told if None in (row["low"], row["high"]) else f"{told}, {row['low']:.2f} to {row['high']:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if not 0 < share < 0.01 else f"{100 * share:.1g} %"


def _both(tasks: Sequence[str], pair: tuple[int, int]) -> str:
    return f"{tasks[pair[0]]} and {tasks[pair[1]]}"
