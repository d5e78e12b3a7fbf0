"""Patterns that weights are pruned in: N kept of every M along a row, and blocks.

N:M (Mishra et al. 2021, arXiv 2104.08378; Zhou et al. 2021, arXiv 2102.04010, prune it by magnitude) has as many zeros in
every group of M consecutive weights of a row, so that there is no budget to share: each group is decided on its own.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hf_disparse.pruning.decision import Masks, Scores, TaskScores, check_quorum, merge_smallest, pairs


def decide_n_of_m(
    task_scores: TaskScores,
    n: int,
    m: int,
    decision: str = "unanimous",
    quorum: int = 1,
    active: Masks | None = None,
) -> Masks:
    """Keeps exactly N of every M consecutive weights of a row (of the input dimension).

    Let r_t(w) be the rank of w for task t in its group of M, 0 = most important, ties by position, M where the score is 0. The
    group keeps the N weights with the smallest

    - `unanimous`: min_t r_t(w); `quorum`: `quorum`-th smallest r_t(w); both then by sum_t r_t(w), for many tie;
    - `mean_rank`: sum_t r_t(w); `joint`: rank of the one task;
    - `sum`, `max`: negative of the sum or maximum of the scores, each task's normalised to sum 1 over all weights,

    ties by position.

    Args:
        task_scores: task -> scores, or an iterable of such pairs, consumed one at a time; matrices (rows, columns).
        active: weights that are False here stay pruned; a mask, all True by default.

    Raises:
        ValueError: no tasks, columns that are no multiple of M, NaN or infinite scores, a quorum above the number of
            tasks, a group of which `active` leaves fewer than N.

    Memory beyond one task's scores: `quorum` + 1 int32 buffers of the weights' size, or one float64.
    """
    ranked = decision not in ("sum", "max")
    best: dict[str, list[Tensor]] = {}  # per weight the `quorum` smallest ranks, sorted
    total: dict[str, Tensor] = {}
    tasks = 0
    for task, scores in pairs(task_scores):
        _check(task, scores, m, active)
        tasks += 1
        for name, one in (scores if ranked else _normalised(scores)).items():
            if not ranked:
                add = torch.maximum if decision == "max" else torch.add
                total[name] = add(total[name], one) if name in total else one
                continue
            rank = ranks_in_groups(one, m, None if active is None else active[name]).masked_fill_(one == 0, m)
            total[name] = total[name] + rank if name in total else rank
            best[name] = merge_smallest(best.get(name, []), rank, quorum)
    if not tasks:
        raise ValueError("task_scores: expected at least one task, got none")
    check_quorum(quorum, tasks)
    masks = {}
    for name in list(total):
        value = -total.pop(name) if ranked else total.pop(name)
        if decision in ("unanimous", "quorum"):
            value = value.long() - best.pop(name)[-1].long() * (tasks * m + 1)  # a sum of ranks is at most T M
        masks[name] = ranks_in_groups(value, m, None if active is None else active[name]) < n
        if active is not None and (masks[name] & ~active[name].bool()).any():
            raise ValueError(f"active: expected at least {n} of every {m} weights, got fewer in a group of '{name}'")
    return masks


def ranks_in_groups(scores: Tensor, m: int, live: Tensor | None = None) -> Tensor:
    """Rank of each score among the M of its group, 0 = largest, ties by position; what is not `live` ranks last.

    Shapes: scores (rows, columns), live the same of bools or None -> (rows, columns) int32; columns a multiple of M.
    """
    groups = scores.reshape(-1, m)
    order = torch.sort(groups, dim=1, descending=True, stable=True).indices
    if live is not None:  # stable: the live ones first, in their order
        gone = ~live.bool().reshape(-1, m).gather(1, order)
        order = order.gather(1, torch.sort(gone.byte(), dim=1, stable=True).indices)
    places = torch.arange(m, dtype=torch.int32, device=scores.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places).reshape(scores.shape)


def pruned_in_groups(masks: Mapping[str, Tensor], n: int, m: int) -> tuple[int, int]:
    """How many weights are pruned, of each group of M at most the M - N that have to be, and of how many weights."""
    gone = [(~keep.reshape(-1, m)).sum(dim=1).clamp(max=m - n) for keep in masks.values()]
    return sum(int(g.sum()) for g in gone), sum(keep.numel() for keep in masks.values())


def pool_blocks(tensors: Mapping[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    """The sum over each block: its score, or how many of its weights a mask keeps.

    Shapes: {name: (R, C)} -> {name: (R / rows, C / columns)} float64.
    """
    return {
        name: tensor.double().unflatten(1, (-1, columns)).sum(dim=2).unflatten(0, (-1, rows)).sum(dim=1)
        for name, tensor in tensors.items()
    }


def expand_blocks(blocks: Mapping[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    """Every block's entry at each of its weights. Shapes: {name: (R / rows, C / columns)} -> {name: (R, C)}."""
    return {
        name: tensor.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1) for name, tensor in blocks.items()
    }


def misfits(tensors: Mapping[str, Tensor], rows: int, columns: int) -> Iterable[str]:
    """The names of the matrices that do not divide into (rows, columns)."""
    return (name for name, t in tensors.items() if t.ndim != 2 or t.shape[0] % rows or t.shape[1] % columns)


def _check(task: str, scores: Scores, m: int, active: Scores | None) -> None:
    for name in misfits(scores, 1, m):
        raise ValueError(f"scores: expected a multiple of {m} columns, got {tuple(scores[name].shape)} for '{name}'")
    for name, tensor in scores.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"scores: expected finite numbers, got NaN or infinity in '{name}' of task '{task}'")
        if active is not None and (name not in active or active[name].shape != tensor.shape):
            raise ValueError(f"active: expected a mask of shape {tuple(tensor.shape)} for '{name}'")


def _normalised(scores: Scores) -> dict[str, Tensor]:
    """Scores that sum to 1 over all weights, in float64; all zeros stay zeros."""
    largest = max(float(tensor.max()) for tensor in scores.values()) or 1.0
    scaled = {name: tensor.double() / largest for name, tensor in scores.items()}  # first, for their sum may overflow
    total = sum(float(tensor.sum()) for tensor in scaled.values()) or 1.0
    return {name: tensor / total for name, tensor in scaled.items()}
