"""How the tasks' scores become one mask: pure functions, streaming task by task.

Words: *scores* are {parameter name: tensor >= 0}, higher is more important. A *mask* is {parameter name: bool tensor},
True = keep. N is the number of prunable weights, T the number of tasks. Layer 4; knows torch only.

The rule (docs/concepts.md derives it). Let R_t(w) be the rank of weight w for task t, 0 = most important, ties by position, and
N where the score is 0: what a task has no use for it can spare.
Task t alone would keep {w : R_t(w) < k}; pruning only what *all* tasks can spare keeps the union over tasks, which is
{w : min_t R_t(w) < k}. So the mask keeps the weights with the smallest min_t R_t(w), cut at the budget: no search for k,
no ties left over, one int32 buffer however many tasks there are. A quorum of m replaces the minimum by the m-th smallest.
"""

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real

import torch
from torch import Tensor

Scores = Mapping[str, Tensor]
TaskScores = Mapping[str, Scores] | Iterable[tuple[str, Scores]]
Masks = dict[str, Tensor]
Cut = Callable[[Tensor], Tensor]


def decide(
    task_scores: TaskScores, sparsity: float, quorum: int = 1, active: Masks | None = None, cut: Cut | None = None
) -> Masks:
    """Prunes exactly `round(sparsity * N)` weights, keeping what at least `quorum` tasks want; 1 is unanimous pruning.

    Args:
        task_scores: task -> scores, or an iterable of such pairs, consumed one at a time.
        sparsity: fraction of all weights that is False in the result, in [0, 1).
        quorum: a weight is ranked by its `quorum`-th best rank over the tasks, in 1..T.
        active: weights that are False here stay pruned and count towards the sparsity; all True by default.
        cut: another budget than a count, so that `sparsity` is not used: (N,) cost of every weight, lower is better -> (N,)
            bool, those that are kept.

    Returns:
        The mask. One task gives plain pruning by its scores.

    Raises:
        ValueError: no tasks, different parameters or shapes, NaN or infinite scores, a sparsity outside [0, 1) or below
            what `active` has pruned, a quorum outside 1..T.

    Memory beyond one task's scores: `quorum` int32 buffers of N and one sort's temporaries; with the scores themselves 41 bytes a
    weight at the peak (measured), on the scores' device. Source: DiSparse, Sun et al. 2022 (arXiv 2206.04662), whose arbiter this
    makes exact; docs/papers.md.
    """
    check_quorum(quorum)

    def smallest_ranks(best: list[Tensor] | None, scores: Tensor, live: Tensor | None) -> list[Tensor]:
        return merge_smallest(best or [], task_ranks(scores, live), quorum)

    def quorumth_rank(best: list[Tensor], tasks: int) -> Tensor:
        check_quorum(quorum, tasks)
        return best[-1]

    return _stream(task_scores, sparsity, active, smallest_ranks, quorumth_rank, cut)


def decide_sum(task_scores: TaskScores, sparsity: float, active: Masks | None = None, cut: Cut | None = None) -> Masks:
    """Keeps the weights with the largest sum over tasks of scores, each task's normalised to sum 1. See `decide`."""
    return _stream(task_scores, sparsity, active, _add_normalised, lambda total, tasks: ranks(total, None), cut)


def decide_max(task_scores: TaskScores, sparsity: float, active: Masks | None = None, cut: Cut | None = None) -> Masks:
    """Keeps the weights with the largest score for any task, each task's normalised to sum 1. See `decide`."""

    def largest(best, scores, live):
        scores = _normalised(scores)
        return scores if best is None else torch.maximum(best, scores, out=best)

    return _stream(task_scores, sparsity, active, largest, lambda best, tasks: ranks(best, None), cut)


def decide_mean_rank(
    task_scores: TaskScores, sparsity: float, active: Masks | None = None, cut: Cut | None = None
) -> Masks:
    """Keeps the weights with the smallest rank on average over the tasks. See `decide`."""

    def add_ranks(total, scores, live):
        rank = task_ranks(scores, live).long()  # int64: T ranks of up to 2^31 are added
        return rank if total is None else total.add_(rank)

    return _stream(task_scores, sparsity, active, add_ranks, lambda total, tasks: total, cut)


def pairs(task_scores: TaskScores) -> Iterable[tuple[str, Scores]]:
    """(task, scores), however they come."""
    return task_scores.items() if isinstance(task_scores, Mapping) else task_scores


def check_quorum(quorum: int, tasks: int | None = None) -> None:
    """Refuses a quorum that is none, or is more than there are tasks."""
    if isinstance(quorum, bool) or not isinstance(quorum, Integral) or not 1 <= quorum <= (tasks or quorum):
        most = "T" if tasks is None else f"{tasks} (the number of tasks)"
        raise ValueError(f"quorum: expected a whole number in 1..{most}, got {quorum!r}")


def task_ranks(scores: Tensor, live: Tensor | None = None) -> Tensor:
    """The R_t of the rule: as `ranks`, but N where the score is 0, and N + 1 for what is not `live`.

    Where scores have a sign, as those of movement pruning, 0 is a score like any other.

    Shapes: scores (N,) floating, live (N,) bool or None -> (N,) int32.
    """
    useless = (scores == 0) & (scores >= 0).all()
    rank = ranks(scores, live).masked_fill_(useless, len(scores))
    return rank if live is None else rank.masked_fill_(~live, len(scores) + 1)


def ranks(scores: Tensor, live: Tensor | None = None) -> Tensor:
    """Rank of each score, 0 = largest, ties by position; what is not `live` ranks last.

    Shapes: scores (N,) floating, live (N,) bool or None -> (N,) int32, a permutation of 0..N-1.

    Integers throughout: float32 ranks would be inexact above 2^24 weights.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    bits = torch.int64 if scores.dtype == torch.float64 else torch.int32
    # The bits of a float, read as an integer, sort like the float does (mirrored below zero), and integers sort several
    # times faster. Adding 0.0 turns -0.0, which has bits of its own, into 0.0.
    key = (scores + 0.0).view(bits)
    key = torch.where(key < 0, key ^ torch.iinfo(bits).max, key).bitwise_not_()  # not: largest first
    if live is not None:
        key[~live] = torch.iinfo(bits).max
    order = torch.sort(key, stable=True).indices
    rank = torch.empty(len(order), dtype=torch.int32, device=scores.device)
    rank[order] = torch.arange(len(order), dtype=torch.int32, device=scores.device)
    return rank


def merge_smallest(best: list[Tensor], rank: Tensor, quorum: int) -> list[Tensor]:
    """Inserts one more task's ranks into the sorted list of the `quorum` smallest, weight by weight. Shapes all (N,)."""
    for i, held in enumerate(best):
        best[i], rank = torch.minimum(held, rank), torch.maximum(held, rank)
    return [*best, rank] if len(best) < quorum else best


def keep_smallest(cost: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` smallest entries of `cost`, ties by position. Shapes: (N,) -> (N,)."""
    if count == 0:
        return torch.zeros_like(cost, dtype=torch.bool)
    limit = torch.kthvalue(cost, count).values
    keep = cost < limit
    tied = (cost == limit).nonzero().squeeze(1)
    keep[tied[: count - int(keep.sum())]] = True
    return keep


def _add_normalised(total: Tensor | None, scores: Tensor, live: Tensor | None) -> Tensor:
    scores = _normalised(scores)
    return scores if total is None else total.add_(scores)


def _normalised(scores: Tensor) -> Tensor:
    """Scores that sum to 1 in float64, so that no task weighs more for the scale of its loss; all zeros stay zeros."""
    scores = scores.double()
    largest = scores.max()
    if largest == 0:
        return scores
    scores = scores / largest  # before they are added, for the sum of large ones may overflow
    return scores / scores.sum()


def _stream(
    task_scores: TaskScores,
    sparsity: float,
    active: Masks | None,
    add: Callable,
    finish: Callable,
    cut: Cut | None,
) -> Masks:
    """The decision from its rule: `add(buffer, scores, live)` folds in one task, `finish(buffer, tasks)` gives the cost, lower stays.

    Shapes: scores, live and cost (N,); the buffer, None at first, is what the rule makes of it.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a number in [0, 1), got {sparsity!r}")
    shapes, live, buffer, tasks = None, None, None, 0
    for task, scores in pairs(task_scores):
        _check(f"task '{task}'", scores, shapes)
        if shapes is None:
            shapes = {name: tensor.shape for name, tensor in scores.items()}
            if active is not None:
                _check("`active`", active, shapes)
                live = torch.cat([active[name].reshape(-1).bool() for name in shapes])
        flat = torch.cat([scores[name].detach().reshape(-1) for name in shapes])
        del scores
        if not torch.isfinite(flat).all():
            name = next(n for n, part in _split(flat, shapes) if not torch.isfinite(part).all())
            raise ValueError(f"scores: expected finite numbers, got NaN or infinity in '{name}' of task '{task}'")
        buffer = add(buffer, flat, live)
        tasks += 1
    if not tasks:
        raise ValueError("task_scores: expected at least one task, got none")
    cost = finish(buffer, tasks)
    size = len(cost)
    count = size - round(float(sparsity) * size)
    if live is not None:
        if cut is None and count > int(live.sum()):
            pruned = size - int(live.sum())
            raise ValueError(
                f"sparsity: {sparsity} prunes {size - count} of {size} weights, but `active` already has {pruned}"
            )
        cost = cost.masked_fill(~live, torch.iinfo(cost.dtype).max)
    keep = keep_smallest(cost, count) if cut is None else cut(cost)
    if cut is not None and live is not None:
        keep &= live
    return {name: part.reshape(shapes[name]).clone() for name, part in _split(keep, shapes)}


def _split(flat: Tensor, shapes: Mapping[str, torch.Size]) -> Iterable[tuple[str, Tensor]]:
    return zip(shapes, flat.split([shape.numel() for shape in shapes.values()]), strict=True)


def _check(what: str, scores: Scores, shapes: Mapping[str, torch.Size] | None) -> None:
    """Raises ValueError unless `scores` has exactly the parameters and shapes of the first task, and at least one."""
    if not scores:
        raise ValueError(f"{what}: expected at least one parameter, got none")
    for name in [] if shapes is None else sorted(set(shapes) ^ set(scores)):
        have, lack = ("it", "the first task") if name in scores else ("the first task", "it")
        raise ValueError(f"{what}: expected the first task's parameters, but {have} has '{name}' and {lack} has not")
    for name, tensor in scores.items():
        if shapes is not None and tensor.shape != shapes[name]:
            want, got = tuple(shapes[name]), tuple(tensor.shape)
            raise ValueError(f"{what}: expected shape {want} for '{name}', as in the first task, got {got}")
