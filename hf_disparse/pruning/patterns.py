"""Sparsity patterns: N kept of every M weights along a row, and blocks.

N:M (Mishra et al. 2021, arXiv 2104.08378; Zhou et al. 2021, arXiv 2102.04010; both by magnitude) has the same number of zeros
in every group of M consecutive weights of a row. There is no budget to share, so each group is decided on its own.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from hf_disparse.pruning.decision import (
    Flat,
    Masks,
    Scores,
    TaskScores,
    add_up,
    check_quorum,
    decide_masks,
    largest_share,
    merge_smallest,
    pairs,
    total_share,
)


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

    - `unanimous`: min_t r_t(w); `quorum`: `quorum`-th smallest r_t(w); in both, sum_t r_t(w) breaks ties, which are many;
    - `mean_rank`: sum_t r_t(w); `joint`: r(w) by the scores of the summed losses;
    - `sum`, `max`: negative of the sum or maximum of the scores, each task's normalised to sum 1 over all weights,

    ties by position.

    Args:
        task_scores: task -> scores, or an iterable of such pairs, consumed one at a time; matrices (rows, columns).
        active: a mask; weights that are False here stay pruned. All True by default.

    Raises:
        ValueError: no tasks, columns that are not a multiple of M, NaN or infinite scores, a quorum above the number of
            tasks, a group in which `active` keeps fewer than N.

    Memory: less than `decide`.
    """

    def rank(scores: Tensor, live: Tensor | None) -> Tensor:
        return ranks_in_groups(scores, m, live).masked_fill_(scores == 0, m)

    def cost(tasks: Iterator[Flat]) -> Tensor:
        if decision in ("sum", "max"):
            return -(total_share(tasks) if decision == "sum" else largest_share(tasks))
        ranked = (rank(scores, live) for scores, live in tasks)
        return add_up(ranked) if decision == "mean_rank" else _quorum_rank_then_sum(ranked, m, quorum)

    def cut(costs: Tensor) -> Tensor:
        return ranks_in_groups(-costs, m) < n

    masks = decide_masks(_in_groups(task_scores, m), cost, cut, active)
    for name, keep in masks.items():
        if (keep.reshape(-1, m).sum(dim=1) < n).any():
            raise ValueError(f"active: expected at least {n} of every {m} weights, got fewer in a group of '{name}'")
    return masks


def _quorum_rank_then_sum(ranked: Iterable[Tensor], m: int, quorum: int) -> Tensor:
    """Combines the `quorum`-th smallest rank with the sum of ranks, which breaks ties. Shapes: (N,) each -> (N,)."""
    smallest, total, tasks = [], 0, 0
    for rank in ranked:
        smallest, total, tasks = merge_smallest(smallest, rank, quorum), total + rank, tasks + 1
    check_quorum(quorum, tasks)
    return smallest[-1].long() * (tasks * m + 1) + total  # a sum of ranks is at most T M


def ranks_in_groups(scores: Tensor, m: int, live: Tensor | None = None) -> Tensor:
    """Rank of each score among the M of its group, 0 = largest, ties by position; weights that are not `live` rank last.

    Shapes: scores (rows, columns), live the same shape, bool, or None -> (rows, columns) int32; columns a multiple of M.
    """
    groups = scores.reshape(-1, m)
    order = torch.sort(groups, dim=1, descending=True, stable=True).indices
    if live is not None:  # stable: the live ones first, in their order
        gone = ~live.bool().reshape(-1, m).gather(1, order)
        order = order.gather(1, torch.sort(gone.byte(), dim=1, stable=True).indices)
    places = torch.arange(m, dtype=torch.int32, device=scores.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places).reshape(scores.shape)


def pruned_in_groups(masks: Mapping[str, Tensor], n: int, m: int) -> tuple[int, int]:
    """(pruned weights, counting at most the M - N that N:M asks for in each group; all weights)."""
    gone = [(~keep.reshape(-1, m)).sum(dim=1).clamp(max=m - n) for keep in masks.values()]
    return sum(int(g.sum()) for g in gone), sum(keep.numel() for keep in masks.values())


def pool_blocks(tensors: Mapping[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    """Sums over each block: its score, or how many of its weights a mask keeps.

    Shapes: {name: (R, C)} -> {name: (R / rows, C / columns)} float64.
    """
    return {
        name: tensor.double().unflatten(1, (-1, columns)).sum(dim=2).unflatten(0, (-1, rows)).sum(dim=1)
        for name, tensor in tensors.items()
    }


def expand_blocks(blocks: Mapping[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    """Repeats every block's entry for each of its weights. Shapes: {name: (R / rows, C / columns)} -> {name: (R, C)}."""
    return {
        name: tensor.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1) for name, tensor in blocks.items()
    }


def misfits(tensors: Mapping[str, Tensor], rows: int, columns: int) -> Iterable[str]:
    """Names of the tensors that do not divide into blocks of (rows, columns)."""
    return (name for name, t in tensors.items() if t.ndim != 2 or t.shape[0] % rows or t.shape[1] % columns)


def _in_groups(task_scores: TaskScores, m: int) -> Iterator[tuple[str, Scores]]:
    """Passes the scores on; raises ValueError if a matrix does not divide into groups of M."""
    for task, scores in pairs(task_scores):
        for name in misfits(scores, 1, m):
            raise ValueError(
                f"scores: expected a multiple of {m} columns, got {tuple(scores[name].shape)} for '{name}'"
            )
        yield task, scores
