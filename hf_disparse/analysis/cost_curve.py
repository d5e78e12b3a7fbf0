"""What sparsity costs: metrics along nested masks of one set of scores, and the knee of that curve. Pure functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from hf_disparse.pruning.decision import Masks, keep_smallest

Metrics = Mapping[str, float]  # task -> points, 0 to 100


def masks_at(costs: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Keeps the n - round(sparsity * n) weights of least cost, ties by position, so that masks of higher sparsity lie within.

    Args:
        costs: parameter name -> the cost of keeping each weight, such as the best rank that any task gives it: all that a decision
            needs of the scores, whatever the sparsity.
    """
    flat = torch.cat([cost.reshape(-1) for cost in costs.values()])
    keep = keep_smallest(flat, len(flat) - round(sparsity * len(flat)))
    pieces = keep.split([cost.numel() for cost in costs.values()])
    return {name: piece.reshape(costs[name].shape) for name, piece in zip(costs, pieces, strict=True)}


def cost_curve(
    measure: Callable[[float, bool], Metrics],
    sparsities: Iterable[float],
    *,
    recover: bool = False,
    within: float | None = None,
) -> dict[str, Any]:
    """Measures from sparsity 0 upwards.

    Args:
        measure: (sparsity, whether it is recovered) -> task -> points: pruned in one shot, or also trained on.
        sparsities: in [0, 1); 0 is added, which is what drops are measured from.
        recover: measure both.
        within: how many points no task may lose, recovered if there is recovery; the first sparsity at which one does is the last
            that is measured.

    Returns:
        {"denominator", "points", "knee", "within"} as in analysis.json; "within" holds the highest sparsity that was within, or None.
    """
    points: list[dict[str, Any]] = []
    best = None
    for sparsity in sorted({0.0, *sparsities}):
        for recovered in (False, True) if recover else (False,):
            metrics = dict(measure(sparsity, recovered))
            average = mean(metrics.values())
            points.append({"sparsity": sparsity, "recovered": recovered, "metrics": metrics, "average": average})
        # A dense model that is trained on is another one: what it was before is what may be lost.
        if within is not None and any(points[0]["metrics"][task] - now > within for task, now in metrics.items()):
            break
        best = sparsity
    return {
        "denominator": "prunable weights",
        "points": points,
        "knee": knees(points),
        "within": None if within is None else {"points": within, "sparsity": best},
    }


def knees(points: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Task, and `average`, -> `knee` of its curve, recovered where there is recovery."""
    recovered = any(point["recovered"] for point in points)
    mine = [point for point in points if point["recovered"] == recovered]
    at = [point["sparsity"] for point in mine]
    curves = {task: [point["metrics"][task] for point in mine] for task in points[0]["metrics"]}
    curves["average"] = [point["average"] for point in mine]
    return {name: knee(at, values) for name, values in curves.items()}


def knee(sparsities: Sequence[float], points: Sequence[float]) -> float | None:
    """The sparsity beyond which the metric goes down fast: where the curve is furthest above its chord.

    Both axes scaled to [0, 1], that is the largest x_i - (y_0 - y_i) / (y_0 - y_n). Source: Kneedle, Satopaa et al. 2011 (ICDCSW),
    without its smoothing. None of fewer than three points, where less than one point is lost from the first to the last, or
    where the curve is nowhere above its chord.
    """
    if len(sparsities) < 3 or points[0] - points[-1] < 1.0:
        return None
    span, drop = sparsities[-1] - sparsities[0], points[0] - points[-1]
    above = [(x - sparsities[0]) / span - (points[0] - y) / drop for x, y in zip(sparsities, points, strict=True)]
    best = max(range(len(above)), key=above.__getitem__)
    return sparsities[best] if above[best] > 1e-9 else None
