"""What sparsity costs: metrics along nested masks from one set of scores, and the knee of that curve. Pure functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from hf_disparse.pruning.decision import Masks, keep_smallest

Metrics = Mapping[str, float]  # task -> points, 0 to 100


def masks_at(costs: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Keeps the n - round(sparsity * n) weights of lowest cost, ties by position; sparser masks are subsets of denser ones.

    Args:
        costs: parameter name -> cost of each weight, such as its best rank over the tasks, from which a decision at any
            sparsity follows.
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
        measure: (sparsity, recovered) -> task -> points, after one-shot pruning or, if recovered, after further training.
        sparsities: in [0, 1); 0 is added, as the baseline for drops.
        recover: measure both.
        within: the most points that any task may lose, after recovery if there is any; measuring stops after the first sparsity
            that loses more.

    Returns:
        {"denominator", "points", "knee", "within"} as in analysis.json; "within" holds the highest sparsity within the limit, or None.
    """
    points: list[dict[str, Any]] = []
    best = None
    for sparsity in sorted({0.0, *sparsities}):
        for recovered in (False, True) if recover else (False,):
            metrics = dict(measure(sparsity, recovered))
            average = mean(metrics.values())
            points.append({"sparsity": sparsity, "recovered": recovered, "metrics": metrics, "average": average})
        # Drops are measured from the dense model before recovery, which further training would change.
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
    """Task (and `average`) -> `knee` of its curve, after recovery if that was measured."""
    recovered = any(point["recovered"] for point in points)
    mine = [point for point in points if point["recovered"] == recovered]
    at = [point["sparsity"] for point in mine]
    curves = {task: [point["metrics"][task] for point in mine] for task in points[0]["metrics"]}
    curves["average"] = [point["average"] for point in mine]
    return {name: knee(at, values) for name, values in curves.items()}


def knee(sparsities: Sequence[float], points: Sequence[float]) -> float | None:
    """The sparsity beyond which the metric falls fast: where the curve is furthest above its chord.

    With x scaled to [0, 1], this maximises x_i - (y_0 - y_i) / (y_0 - y_n). Source: Kneedle, Satopaa et al. 2011 (ICDCSW),
    without its smoothing. None with fewer than three values, if less than one metric point is lost from first to last, or if
    the curve is nowhere above its chord.
    """
    if len(sparsities) < 3 or points[0] - points[-1] < 1.0:
        return None
    span, drop = sparsities[-1] - sparsities[0], points[0] - points[-1]
    above = [(x - sparsities[0]) / span - (points[0] - y) / drop for x, y in zip(sparsities, points, strict=True)]
    best = max(range(len(above)), key=above.__getitem__)
    return sparsities[best] if above[best] > 1e-9 else None
