"""How the tasks' scores become one mask: pure functions that see one task at a time.

Terms: *scores* are {parameter name: tensor >= 0}, higher is more important. A *mask* is {parameter name: bool tensor},
True = keep. N is the number of prunable weights, T the number of tasks. A *live* weight has not been pruned yet.

The rule (derived in docs/concepts.md): let R_t(w) be the rank of weight w for task t, 0 = most important, ties by position, and
N where the score is 0, since a task can spare a weight that it does not use.
Task t alone would keep {w : R_t(w) < k}. Pruning only what *all* tasks can spare keeps the union over tasks, which is
{w : min_t R_t(w) < k}. So the mask keeps the weights with the smallest min_t R_t(w), cut at the budget: no search for k,
no leftover ties, one int32 buffer for any number of tasks. A quorum of m replaces the minimum by the m-th smallest.

In code, `decide_masks` flattens the scores task by task, a *cost* such as `quorum_rank` reduces them to one number per weight,
and a *cut* such as `keep_smallest` chooses the weights to keep.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from numbers import Integral, Real

import torch
from torch import Tensor

Scores = Mapping[str, Tensor]
TaskScores = Mapping[str, Scores] | Iterable[tuple[str, Scores]]
Masks = dict[str, Tensor]
Flat = tuple[Tensor, Tensor | None]  # one task's scores (N,), and the live weights (N,) bool, None = all
Cost = Callable[[Iterator[Flat]], Tensor]  # the tasks, one at a time -> cost (N,), lowest kept first
Cut = Callable[[Tensor], Tensor]  # cost (N,) -> bool (N,), True = keep


def decide(
    task_scores: TaskScores, sparsity: float, quorum: int = 1, active: Masks | None = None, cut: Cut | None = None
) -> Masks:
    """Prunes exactly `round(sparsity * N)` weights, keeping what at least `quorum` tasks want; with 1, pruning is unanimous.

    Args:
        task_scores: task -> scores, or an iterable of such pairs, consumed one at a time.
        sparsity: fraction of all weights that is False in the result, in [0, 1).
        quorum: a weight is ranked by its `quorum`-th best rank over the tasks, in 1..T.
        active: weights that are False here stay pruned and count towards the sparsity; all True by default.
        cut: chooses the weights instead of `sparsity`, which is then ignored: cost of every weight (N,), lower is better ->
            (N,) bool, True = keep.

    Returns:
        The mask. With one task this is plain pruning by its scores.

    Raises:
        ValueError: no tasks, different parameters or shapes, NaN or infinite scores, a sparsity outside [0, 1) or below
            that of `active`, a quorum outside 1..T.

    Memory beyond one task's scores: `quorum` int32 buffers of N and the temporaries of one sort; with the scores, 41 bytes a
    weight at the peak (measured), on the scores' device. Source: DiSparse, Sun et al. 2022 (arXiv 2206.04662), whose arbiter
    this makes exact; see docs/papers.md.
    """
    check_quorum(quorum)

    def cost(tasks: Iterator[Flat]) -> Tensor:
        return quorum_rank((task_ranks(scores, live) for scores, live in tasks), quorum)

    return _decide(cost, task_scores, sparsity, active, cut)


def decide_sum(task_scores: TaskScores, sparsity: float, active: Masks | None = None, cut: Cut | None = None) -> Masks:
    """Keeps the weights with the largest sum over tasks of scores, each task's normalised to sum 1. See `decide`."""
    return _decide(lambda tasks: ranks(total_share(tasks)), task_scores, sparsity, active, cut)


def decide_max(task_scores: TaskScores, sparsity: float, active: Masks | None = None, cut: Cut | None = None) -> Masks:
    """Keeps the weights with the largest score for any task, each task's normalised to sum 1. See `decide`."""
    return _decide(lambda tasks: ranks(largest_share(tasks)), task_scores, sparsity, active, cut)


def decide_mean_rank(
    task_scores: TaskScores, sparsity: float, active: Masks | None = None, cut: Cut | None = None
) -> Masks:
    """Keeps the weights with the smallest mean rank over the tasks. See `decide`."""

    def cost(tasks: Iterator[Flat]) -> Tensor:
        return add_up(task_ranks(scores, live).long() for scores, live in tasks)  # int64: ranks go up to 2^31

    return _decide(cost, task_scores, sparsity, active, cut)


def quorum_rank(task_ranks: Iterable[Tensor], quorum: int) -> Tensor:
    """The `quorum`-th smallest rank of each weight over the tasks; 1 gives min_t R_t(w). Shapes: (N,) each -> (N,)."""
    smallest: list[Tensor] = []
    for rank in task_ranks:
        smallest = merge_smallest(smallest, rank, quorum)
        del rank  # else it is held while the next task is ranked
    check_quorum(quorum, tasks=len(smallest))
    return smallest[-1]


def merge_smallest(smallest: list[Tensor], rank: Tensor, quorum: int) -> list[Tensor]:
    """Inserts one more task's ranks into the sorted list of the `quorum` smallest, for each weight. Shapes all (N,)."""
    for i, held in enumerate(smallest):
        smallest[i], rank = torch.minimum(held, rank), torch.maximum(held, rank)
    return [*smallest, rank] if len(smallest) < quorum else smallest


def total_share(tasks: Iterable[Flat]) -> Tensor:
    """The sum over tasks of their normalised scores. Shapes: (N,) each -> (N,) float64."""
    return add_up(normalised(scores) for scores, _ in tasks)


def largest_share(tasks: Iterable[Flat]) -> Tensor:
    """The maximum over tasks of their normalised scores. Shapes: (N,) each -> (N,) float64."""
    largest = None
    for scores, _ in tasks:
        share = normalised(scores)
        largest = share if largest is None else torch.maximum(largest, share, out=largest)
        del share
    return largest


def normalised(scores: Tensor) -> Tensor:
    """Scales scores to sum 1, so that the scale of a task's loss does not count; all zeros stay zeros. (N,) -> (N,) float64."""
    scores = scores.double()
    largest = scores.max()
    if largest == 0:
        return scores
    scores = scores / largest  # before summing, because a sum of large scores may overflow
    return scores / scores.sum()


def add_up(tensors: Iterable[Tensor]) -> Tensor:
    """Sums tensors that arrive one at a time, into the first of them. Shapes all (N,)."""
    total = None
    for tensor in tensors:
        total = tensor if total is None else total.add_(tensor)
        del tensor
    return total


def task_ranks(scores: Tensor, live: Tensor | None = None) -> Tensor:
    """R_t of the rule: as `ranks`, but N where the score is 0, and N + 1 where the weight is not `live`.

    Where scores have signs, as in movement pruning, 0 is a score like any other.

    Shapes: scores (N,) floating, live (N,) bool or None -> (N,) int32.
    """
    useless = (scores == 0) & (scores >= 0).all()
    rank = ranks(scores, live).masked_fill_(useless, len(scores))
    return rank if live is None else rank.masked_fill_(~live, len(scores) + 1)


def ranks(scores: Tensor, live: Tensor | None = None) -> Tensor:
    """Rank of each score, 0 = largest, ties by position; weights that are not `live` rank last.

    Shapes: scores (N,) floating, live (N,) bool or None -> (N,) int32, a permutation of 0..N-1.

    Integers throughout: float32 ranks would be inexact above 2^24 weights.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    bits = torch.int64 if scores.dtype == torch.float64 else torch.int32
    # The bits of a float, read as an integer, sort like the float (mirrored below zero), and integers sort several times
    # faster. Adding 0.0 turns -0.0, whose bits differ, into 0.0.
    key = (scores + 0.0).view(bits)
    key = torch.where(key < 0, key ^ torch.iinfo(bits).max, key).bitwise_not_()  # bitwise not: largest first
    if live is not None:
        key[~live] = torch.iinfo(bits).max
    order = torch.sort(key, stable=True).indices
    rank = torch.empty(len(order), dtype=torch.int32, device=scores.device)
    rank[order] = torch.arange(len(order), dtype=torch.int32, device=scores.device)
    return rank


def keep_smallest(cost: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` smallest entries of `cost`, ties by position. Shapes: (N,) -> (N,)."""
    if count == 0:
        return torch.zeros_like(cost, dtype=torch.bool)
    limit = torch.kthvalue(cost, count).values
    keep = cost < limit
    tied = (cost == limit).nonzero().squeeze(1)
    keep[tied[: count - int(keep.sum())]] = True
    return keep


def decide_masks(task_scores: TaskScores, cost: Cost, cut: Cut, active: Masks | None = None) -> Masks:
    """The masks that `cut` makes of the tasks' `cost`, the core of all decisions.

    Args:
        task_scores, active: as in `decide`; weights are flattened in the order of the first task's parameters.
        cost: (one task's scores, live), one task at a time -> (N,) integers.
        cut: costs (N,), the largest value of their type where a weight is not live -> (N,) bool, True = keep.
    """
    shapes: dict[str, torch.Size] = {}
    live: Tensor | None = None

    def tasks() -> Iterator[Flat]:
        nonlocal live
        for task, scores in pairs(task_scores):
            _check(f"task '{task}'", scores, shapes)
            if not shapes:
                shapes.update((name, tensor.shape) for name, tensor in scores.items())
                if active is not None:
                    _check("`active`", active, shapes)
                    live = torch.cat([active[name].reshape(-1).bool() for name in shapes])
            flat = torch.cat([scores[name].detach().reshape(-1) for name in shapes])
            del scores
            if not torch.isfinite(flat).all():
                name = next(name for name, part in _split(flat, shapes) if not torch.isfinite(part).all())
                raise ValueError(f"scores: expected finite numbers, got NaN or infinity in '{name}' of task '{task}'")
            yield flat, live
        if not shapes:
            raise ValueError("task_scores: expected at least one task, got none")

    costs = cost(tasks())
    if live is not None:
        costs = costs.masked_fill(~live, math.inf if costs.is_floating_point() else torch.iinfo(costs.dtype).max)
    keep = cut(costs)
    if live is not None:
        keep &= live
    return {name: part.reshape(shapes[name]).clone() for name, part in _split(keep, shapes)}


def pairs(task_scores: TaskScores) -> Iterable[tuple[str, Scores]]:
    """The (task, scores) pairs of a mapping, or of an iterable of them."""
    return task_scores.items() if isinstance(task_scores, Mapping) else task_scores


def check_quorum(quorum: int, tasks: int | None = None) -> None:
    """Raises ValueError unless `quorum` is a whole number of at least 1, and at most the number of tasks if that is known."""
    if isinstance(quorum, bool) or not isinstance(quorum, Integral) or not 1 <= quorum <= (tasks or quorum):
        most = "T" if tasks is None else f"{tasks} (the number of tasks)"
        raise ValueError(f"quorum: expected a whole number in 1..{most}, got {quorum!r}")


def _decide(cost: Cost, task_scores: TaskScores, sparsity: float, active: Masks | None, cut: Cut | None) -> Masks:
    """Calls `decide_masks` at a sparsity, which it checks before the first task is scored."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a number in [0, 1), got {sparsity!r}")
    if cut is None and active is not None:
        size = sum(mask.numel() for mask in active.values())
        pruned = size - sum(int(mask.count_nonzero()) for mask in active.values())
        if pruned > (count := round(float(sparsity) * size)):
            raise ValueError(
                f"sparsity: {sparsity} prunes {count} of {size} weights, but `active` already has {pruned}"
            )
    return decide_masks(task_scores, cost, cut or partial(_keep_all_but, share=float(sparsity)), active)


def _keep_all_but(cost: Tensor, share: float) -> Tensor:
    return keep_smallest(cost, len(cost) - round(share * len(cost)))


def _split(flat: Tensor, shapes: Mapping[str, torch.Size]) -> Iterable[tuple[str, Tensor]]:
    return zip(shapes, flat.split([shape.numel() for shape in shapes.values()]), strict=True)


def _check(what: str, scores: Scores, shapes: Mapping[str, torch.Size]) -> None:
    """Raises ValueError if `scores` is empty or differs in names or shapes from the first task's `shapes`, if known."""
    if not scores:
        raise ValueError(f"{what}: expected at least one parameter, got none")
    for name in sorted(set(shapes) ^ set(scores)) if shapes else []:
        have, lack = ("it", "the first task") if name in scores else ("the first task", "it")
        raise ValueError(f"{what}: expected the first task's parameters, but {have} has '{name}' and {lack} does not")
    for name, tensor in scores.items() if shapes else []:
        if tensor.shape != shapes[name]:
            want, got = tuple(shapes[name]), tuple(tensor.shape)
            raise ValueError(f"{what}: expected shape {want} for '{name}', as in the first task, got {got}")
