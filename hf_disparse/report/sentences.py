"""One to three sentences per figure that say what there is to see in it, made from its numbers.

A difference within its interval is never presented as a finding; if there is nothing to see, the sentence says so.
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

ONE_TASK = "Only one task was analysed: there is no other to compare it with."


def agreement_sentence(stages: Sequence[Mapping]) -> str:
    """Where all tasks agree most and least at the last stage, and the watersheds of all stages."""
    last = stages[-1]
    lines = lines_of(last["agreement"], "all")
    if not lines:
        return ONE_TASK
    rows, when = lines[together(lines)], _when(last)
    who = "both tasks" if len(together(lines)) == 2 else f"all {len(together(lines))} tasks"
    intervals = [row for row in rows if row["low"] is not None and row["high"] is not None]
    if intervals and len(intervals) == len(rows) and all(row["low"] <= 0 <= row["high"] for row in rows):
        text = f"{when}, the agreement of {who} differs from chance in no layer: every interval contains 0."
    else:
        least, most = (pick(rows, key=lambda row: row["beyond_chance"]) for pick in (min, max))
        text = f"{when}, {who} agree most in layer {most['layer']} ({_value(most)})"
        text += f" and least in layer {least['layer']} ({_value(least)})." if least is not most else "."
        if least is not most and None not in (most["low"], least["high"]) and most["low"] <= least["high"]:
            text += " Their intervals overlap, so the layers may not differ."
    return f"{text} {watershed_sentence(stages)}"


def watershed_sentence(stages: Sequence[Mapping]) -> str:
    """The layer where agreement falls for good, at each stage."""
    found = [stage for stage in stages if stage["watershed"]["layer"] is not None]
    if not found:
        return (
            "No stage has a watershed: agreement never falls for good." if len(stages) > 1 else "There is no watershed."
        )
    names_by_place: dict[tuple[str, str], list[str]] = {}
    for stage in found:
        mark = stage["watershed"]
        place = f"layer {mark['layer']}"
        if mark["low"] is not None and mark["high"] is not None and mark["low"] < mark["high"]:
            place += f" ({mark['low']} to {mark['high']})"
        support = f"in {_percent(mark['share'])} of the bootstrap samples"
        names_by_place.setdefault((place, support), []).append(stage_name(stage))
    pieces = [f"{place} {' and '.join(names)}, {support}" for (place, support), names in names_by_place.items()]
    without = [stage_name(stage) for stage in stages if stage not in found]
    pieces += [f"there is none {' and '.join(without)}"] if without else []
    return f"The watershed, where agreement falls for good, is {'; '.join(pieces)}."


def agreement_by_kind_sentence(stages: Sequence[Mapping]) -> str:
    """The kinds of matrices that tasks share most and least at the last stage."""
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
        return f"{_when(last)}, there are no two kinds of matrices to compare."
    low, high = ends
    text = (
        f"{_when(last)}, averaged over the layers, tasks agree most on the {high} matrices ({means[high]:.2f}) and least on "
        f"the {low} matrices ({means[low]:.2f})."
    )
    if widths and means[high] - means[low] < mean_of(widths):
        text += " The difference is smaller than the interval of a single cell: do not read much into it."
    return text


def affinity_sentence(stage: Mapping, tasks: Sequence[str]) -> str:
    """The two tasks that are most and least alike, and how many pairs have conflicting gradients."""
    if not several(tasks):
        return ONE_TASK
    pieces = []
    for key, label, most, least in (
        ("importance", "shared importance", "overlap most in the weights that matter to them", "overlap least"),
        ("gradient_cosine", "gradient cosine", "have the most similar gradients", "the least similar"),
    ):
        values = off_diagonal(stage["affinity"][key])
        ends = extremes(values)
        if not ends:
            pieces.append(f"There is no {label} to compare.")
        elif len(ends) == 1:
            pieces.append(f"{_both(tasks, ends[0])}: {label} {values[ends[0]]:.2f}.")
        else:
            low, high = ends
            pieces.append(
                f"{_both(tasks, high)} {most} ({values[high]:.2f}), {_both(tasks, low)} {least} ({values[low]:.2f})."
            )
    values = [v for v in off_diagonal(stage["affinity"]["gradient_cosine"]).values() if math.isfinite(v)]
    against = sum(value < 0 for value in values)
    if against:
        pieces.append(f"The gradients of {against} of {len(values)} pairs point in opposing directions.")
    elif values:
        pair = "No two tasks" if len(values) > 1 else "The two tasks do not"
        pieces.append(f"{pair} have gradients that point in opposing directions.")
    return f"{_when(stage)}: " + " ".join(pieces)


def keepers_sentence(stage: Mapping, layers: Sequence[int], kept_by: Sequence[Sequence[float]], what: str) -> str:
    """The share of the weights, heads or neurons (`what`) that all tasks keep and that one task alone keeps."""
    tasks = len(kept_by[0]) - 1
    if tasks < 2:
        share = mean_of(row[-1] for row in kept_by)
        return f"{_when(stage)}, the task keeps {_percent(share)} of the {what}; there is no other task."
    alone = {layer: number(row[1]) for layer, row in zip(layers, kept_by, strict=True)}
    everyone = mean_of(row[-1] for row in kept_by)
    text = f"{_when(stage)}, averaged over the layers, all tasks keep {_percent(everyone)} of the {what} and "
    text += f"one task alone keeps {_percent(mean_of(alone.values()))}"
    ends = extremes(alone)
    if len(ends) == 2 and _percent(alone[ends[0]]) != _percent(alone[ends[1]]):
        low, high = ends
        text += f", most in layer {high} ({_percent(alone[high])}) and least in layer {low} ({_percent(alone[low])})"
    elif len(layers) > 1:
        text += ", the same in every layer"
    return text + "."


def keepers_by_kind_sentence(alone: Mapping[str, float], tasks: Sequence[str]) -> str:
    """The kinds of matrices that one task alone keeps most and least of.

    Args:
        alone: kind -> the share that one task alone keeps, averaged over the layers.
    """
    who = "one task alone" if several(tasks) else "the task"
    low, high = min(alone, key=alone.__getitem__), max(alone, key=alone.__getitem__)
    least, most = (f"{100 * alone[kind]:.0f} %" for kind in (low, high))
    if least == most:
        return f"Averaged over the layers, {who} keeps the same share of every kind of matrix ({most})."
    return (
        f"Averaged over the layers, {who} keeps the largest share of the {high} matrices ({most}) and the smallest of the "
        f"{low} matrices ({least})."
    )


def heads_sentence(stage: Mapping, tasks: Sequence[str]) -> str:
    """How many heads all tasks, one task alone and no task keep, and which task has most heads to itself."""
    rows = [set(names) for part in stage["parts"] if part["granularity"] == "head" for names in part["heads"]]
    if not rows:
        return "No head was scored."
    if not several(tasks):
        return f"{_when(stage)}, the task keeps {sum(map(len, rows))} of {len(rows)} heads."
    sizes = [len(row) for row in rows]
    text = (
        f"{_when(stage)}, of {len(rows)} heads, all tasks keep {sizes.count(len(tasks))}, one task alone keeps "
        f"{sizes.count(1)} and no task keeps {sizes.count(0)}."
    )
    alone = {task: sum(row == {task} for row in rows) for task in tasks}
    most = max(alone, key=alone.__getitem__)
    if alone[most] and list(alone.values()).count(alone[most]) == 1:
        text += f" {most} has the most heads to itself ({alone[most]})."
    return text


def cost_sentence(curve: Mapping) -> str:
    """The knee, the sparsity up to which no task loses too much, who loses most, and what further training recovers."""
    tasks, knee = curve_tasks(curve), curve["knee"] or {}
    at = knee.get("average")
    pieces = [f"The average has its knee at {_percent(at)} pruned." if at is not None else "The average has no knee."]
    within = curve.get("within")
    if within:
        lost = f"{within['points']:g} point{'' if within['points'] == 1 else 's'}"
        reach = within["sparsity"]
        pieces.append(
            f"At every sparsity tried, some task loses more than {lost}."
            if reach is None
            else f"Up to {_percent(reach)} pruned, no task loses more than {lost}."
        )
    if several(tasks):
        losses = {task: loss(curve, task) for task in tasks}
        ends = extremes(losses)
        if len(ends) == 2:
            low, high = ends
            pieces.append(
                f"From the lowest to the highest sparsity, {high} loses most ({losses[high]:.1f} points) and {low} least "
                f"({losses[low]:.1f})."
            )
    averages: dict[float, dict[bool, float]] = {}
    for point in curve["points"]:
        averages.setdefault(point["sparsity"], {})[point["recovered"]] = point["average"]
    both = [at for at, values in averages.items() if len(values) == 2]
    if both:
        gain = averages[max(both)][True] - averages[max(both)][False]
        pieces.append(f"At {_percent(max(both))} pruned, further training changes the average by {gain:+.1f} points.")
    return " ".join(pieces)


def footprint_sentence(rows: Sequence[Mapping]) -> str:
    """What is left of parameters, bytes and multiplications, and which module holds most of it."""

    def total(key: str) -> int:
        return sum(row[key] for row in rows)

    if not total("parameters"):
        return "There are no parameters to count."
    left = total("nonzeros")
    text = f"{left:,} of {total('parameters'):,} parameters are not zero ({_percent(left / total('parameters'))})"
    costs = []
    if total("bytes_dense"):
        costs.append(f"{_percent(total('bytes_packed') / total('bytes_dense'))} of the bytes")
    if total("multiplications"):
        costs.append(f"{_percent(total('multiplications_left') / total('multiplications'))} of the multiplications")
    if costs:
        text += f"; they take {' and '.join(costs)} of the dense model"
    most = max(rows, key=lambda row: row["nonzeros"])
    return f"{text}. {most['module']} holds the largest share of them ({_percent(most['nonzeros'] / max(1, left))})."


def comparison_sentence(rows: Sequence[Mapping]) -> str:
    """The best method at the highest sparsity, and whether its lead may be chance."""
    pruned = [row for row in rows if row["method"] != "dense"]
    if not pruned:
        return "Only the dense model was trained: there is nothing to compare it with."
    top = max(row["sparsity"] for row in pruned)
    there = sorted((r for r in pruned if r["sparsity"] == top), key=lambda r: r["mean"]["average"], reverse=True)
    best = there[0]
    text = f"At {_percent(top)} pruned, {method_name(best)} has the highest average ({best['mean']['average']:.1f})"
    if best["against_dense"] is not None:  # over the seeds that both have
        text += f", {best['against_dense']:+.1f} points relative to dense"
    text += "."
    if len(there) > 1:
        second = there[1]
        lead = best["mean"]["average"] - second["mean"]["average"]
        spreads = [row["spread"]["average"] for row in (best, second)]
        text += f" It leads {method_name(second)} by {lead:.1f} points"
        if None in spreads:
            text += ", with one seed each: this may be chance."
        elif lead <= max(spreads):
            text += ", less than one standard deviation over seeds: this may be chance."
        else:
            text += ", more than one standard deviation over seeds."
    return text


def results_sentence(results: Mapping) -> str:
    """The sparse model's average beside the dense model's, and the share of zeros."""
    dense, sparse = results["dense"]["average"], results["sparse"]["average"]
    return (
        f"With {100 * results['sparsity']['prunable']:.1f} % of the prunable weights pruned, the tasks average {sparse:.1f}; "
        f"dense, they average {dense:.1f}."
    )


def speed_sentence(speed: Mapping, name: str) -> str:
    """What was timed, and how to get the speed, or why there is none. `name` is what to load, a folder or a Hub id."""
    what = (
        f"Texts of {speed['tokens']} tokens, one core, float32, the encoder with its embeddings. Dense is plain torch;"
    )
    if "reason" in speed:
        return f"{what} the model cannot be sped up: {speed['reason']}."
    return f'{what} sped up is MultitaskPipeline.from_pretrained("{name}", fast=True) or hf_disparse.speed_up(model).'


# Pieces


def _when(stage: Mapping) -> str:
    name = stage_name(stage)
    return name[:1].upper() + name[1:]


def _value(row: Mapping) -> str:
    text = f"{row['beyond_chance']:.2f}"
    return text if None in (row["low"], row["high"]) else f"{text}, {row['low']:.2f} to {row['high']:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if not 0 < share < 0.01 else f"{100 * share:.1g} %"


def _both(tasks: Sequence[str], pair: tuple[int, int]) -> str:
    return f"{tasks[pair[0]]} and {tasks[pair[1]]}"
