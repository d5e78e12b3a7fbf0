"""How many tasks keep each weight, and which heads and neurons serve which task. Pure functions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_disparse.analysis.agreement import Tally, TaskMasks, tally
from hf_disparse.analysis.names import layer_and_kind
from hf_disparse.analysis.own_masks import own_mask
from hf_disparse.pruning.parts import Sites, sum_by_part


def keepers(masks: TaskMasks | Tally, live: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
    """One row {"layer", "kind", "kept_by"} per matrix, and per layer with kind `all`.

    `kept_by` has T + 1 shares of the (live) weights, sum 1: kept by no task, by one, two, ..., all. Arguments as in `agreement`.
    """
    counts = masks if isinstance(masks, Tally) else tally(masks, live)
    shares = (counts.votes / counts.votes.sum(-1, keepdim=True)).tolist()
    return [
        {"layer": layer, "kind": kind, "kept_by": kept}
        for (layer, kind), kept in zip(counts.groups, shares, strict=True)
    ]


def part_scores(scores: Mapping[str, Tensor], sites: Sites) -> dict[str, dict[str, Tensor]]:
    """One task's scores of the parts, each the sum over its weights: kind -> site -> (parts,) float64.

    Leaves out sites with a matrix that has no scores.
    """
    return {
        kind: {
            name: sum_by_part(scores, site)
            for name, site in places.items()
            if all(f"{module}.weight" in scores for module in site.members)
        }
        for kind, places in sites.items()
    }


def parts(task_scores: Mapping[str, Mapping[str, Mapping[str, Tensor]]], sparsity: float) -> list[dict[str, Any]]:
    """Which heads and neurons serve which tasks: the parts that each task would keep if it were alone.

    For each kind, a task keeps its (1 - sparsity) best parts over all layers, among those that any task scores above 0.

    Args:
        task_scores: task -> the result of `part_scores`.

    Returns:
        A row per site: "layer", "granularity" (the kind), "count" of parts, "kept_by_task" (task -> how many), "kept_by" (how many
        parts are kept by 0, 1, ..., T tasks), and for heads also "heads": for each head the tasks that keep it.
    """
    rows = []
    for kind, sites in next(iter(task_scores.values())).items():
        live = {name: sum(scores[kind][name] for scores in task_scores.values()) > 0 for name in sites}
        if not any(alive.any() for alive in live.values()):
            continue
        masks = {task: own_mask(scores[kind], sparsity, live) for task, scores in task_scores.items()}
        for name, (layer, _) in layer_and_kind(sites).items():
            by_task = {task: mask[name].cpu() for task, mask in masks.items()}
            votes = sum(keep.long() for keep in by_task.values())
            row = {
                "layer": layer,
                "granularity": kind,
                "count": len(votes),
                "kept_by_task": {task: int(keep.sum()) for task, keep in by_task.items()},
                "kept_by": torch.bincount(votes, minlength=len(by_task) + 1).tolist(),
            }
            if kind == "head":
                row["heads"] = [[task for task, keep in by_task.items() if keep[i]] for i in range(len(votes))]
            rows.append(row)
    return rows
