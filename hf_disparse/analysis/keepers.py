"""Who keeps what: weights by the number of tasks that keep them, and the heads and neurons that serve each task. Pure functions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_disparse.analysis.agreement import Tally, TaskMasks, tally
from hf_disparse.analysis.names import layer_and_kind
from hf_disparse.analysis.own_masks import own_mask
from hf_disparse.pruning.parts import Site, sum_by_part

Sites = Mapping[str, Mapping[str, Site]]  # kind of part -> name of the site -> site


def keepers(masks: TaskMasks | Tally, live: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
    """One row {"layer", "kind", "kept_by"} per matrix, and per layer as kind `all`.

    `kept_by` has T + 1 shares of the (live) weights, sum 1: those that no task keeps, one task alone, two, ..., all.
    Arguments as of `agreement`.
    """
    counts = masks if isinstance(masks, Tally) else tally(masks, live)
    shares = (counts.votes / counts.votes.sum(-1, keepdim=True)).tolist()
    return [
        {"layer": layer, "kind": kind, "kept_by": kept}
        for (layer, kind), kept in zip(counts.groups, shares, strict=True)
    ]


def part_scores(scores: Mapping[str, Tensor], sites: Sites) -> dict[str, dict[str, Tensor]]:
    """One task's scores of the parts, each the sum of those of its weights: kind -> site -> (parts,) float64.

    A site is left out if `scores` lack one of its matrices.
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
    """Which heads and neurons serve which tasks: those that a task would keep if it were alone and parts went as a whole.

    Of every kind a task keeps the (1 - sparsity) best over all layers, of the parts that have a score above 0 for any task.

    Args:
        task_scores: task -> what `part_scores` gives.

    Returns:
        A row per site: "layer", "granularity" (the kind), "count" of parts, "kept_by_task" (task -> how many), "kept_by" (how many
        parts are kept by 0, 1, ..., T tasks), and of heads "heads": for each the tasks that keep it.
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
