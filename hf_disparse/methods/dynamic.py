"""Dynamic sparse training over tasks: how many weights each matrix has, which are dropped, which grow in their place.

Sources: RigL, Evci et al. 2020 (arXiv 1911.11134), section 3 and algorithm 1; the dynamic variant of DiSparse, Sun et al. 2022
(arXiv 2206.04662), in which every task looks for the weights to grow on its own.

Words: a *group* is a tuple of parameter names within which weights compete: one matrix, or all of them. *Counts* are
{group: how many}. A mask is {parameter name: bool tensor}, True = live. Layer 4; knows torch only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_disparse.config import PruningConfig
from hf_disparse.methods.base import Method, Update
from hf_disparse.pruning.decision import (
    Masks,
    TaskScores,
    check_quorum,
    keep_smallest,
    merge_smallest,
    pairs,
    task_ranks,
)
from hf_disparse.pruning.masks import zero_pruned
from hf_disparse.pruning.schedule import cosine_decay, end_of, update_steps
from hf_disparse.pruning.scores import GRADIENT_CRITERIA

Shapes = Mapping[str, Sequence[int]]
Counts = dict[tuple[str, ...], int]


def allocate(allocation: str, shapes: Shapes, count: int) -> Counts:
    """Shares `count` live weights out to the matrices: by `erk`, `uniform`, or `global`, which leaves it to the scores.

    Shapes: {name: (n_out, n_in)} -> counts that add up to `count` exactly.
    """
    if allocation == "global":
        return {tuple(shapes): count}
    shares = {"erk": erdos_renyi, "uniform": uniform}[allocation](shapes, count)
    return {(name,): number for name, number in round_to(shares, count).items()}


def erdos_renyi(shapes: Shapes, count: int) -> dict[str, float]:
    """Live weights per matrix, real numbers: min(n_in n_out, eps (n_in + n_out)), eps such that they add up to `count`.

    A density of eps (n_in + n_out) / (n_in n_out), RigL section 3 (1): the larger the matrix, the sparser. What a dense
    matrix cannot take goes to the others by the same rule.
    """
    dense: dict[str, float] = {}
    while True:
        rest = {name: shape for name, shape in shapes.items() if name not in dense}
        eps = (count - sum(dense.values())) / max(1, sum(sum(shape) for shape in rest.values()))
        full = {name: float(math.prod(shape)) for name, shape in rest.items() if eps * sum(shape) >= math.prod(shape)}
        if not full:  # eps only grows with every round, so that what is dense stays so
            return {name: dense.get(name, eps * sum(shape)) for name, shape in shapes.items()}
        dense |= full


def uniform(shapes: Shapes, count: int) -> dict[str, float]:
    """Live weights per matrix, real numbers: the same density everywhere."""
    size = sum(math.prod(shape) for shape in shapes.values())
    return {name: count * math.prod(shape) / size for name, shape in shapes.items()}


def round_to(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """Whole numbers that add up to `count`: rounded down, and one more for the largest remainders, ties by position."""
    whole = {name: math.floor(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: whole[name] - shares[name])
    for name in by_remainder[: count - sum(whole.values())]:
        whole[name] += 1
    return whole


def select(task_scores: TaskScores, among: Masks, counts: Counts, quorum: int = 1) -> Masks:
    """True for the `counts` weights of each group, of those in `among`, that at least `quorum` tasks want most.

    R_t(w) is the rank of w for task t among the eligible weights of its group, 0 = highest score, last where the score is 0; the
    chosen ones have the smallest m-th smallest R_t(w) over the tasks, m the quorum: min_t R_t(w) for unanimous pruning. First
    mask: of all weights. Drop: the live ones that stay, RigL's ArgTopK(-|w|, k) of one task's |w| if those are the scores.

    Args:
        task_scores: task -> scores, or an iterable of such pairs, consumed one at a time.
        among: what may be chosen, of at least `counts` in each group.

    Raises:
        ValueError: scores that are not finite, a quorum above the number of tasks.

    Memory beyond one task's scores: `quorum` int32 buffers of all weights, and one sort's temporaries in a group.
    """
    best: dict[tuple[str, ...], list[Tensor]] = {group: [] for group in counts}
    tasks = 0
    for task, scores in pairs(task_scores):
        tasks += 1
        for group in counts:
            flat, eligible = (torch.cat([t[name].detach().reshape(-1) for name in group]) for t in (scores, among))
            if not torch.isfinite(flat).all():
                raise ValueError(f"scores: expected finite numbers, got NaN or infinity for task '{task}' in {group}")
            best[group] = merge_smallest(best[group], task_ranks(flat, eligible), quorum)
    check_quorum(quorum, tasks)
    chosen = {}
    for group, count in counts.items():
        parts = keep_smallest(best[group][-1], count).split([among[name].numel() for name in group])
        chosen |= {name: part.reshape(among[name].shape).clone() for name, part in zip(group, parts, strict=True)}
    return chosen


def count_live(live: Masks, groups: Iterable[tuple[str, ...]]) -> Counts:
    """How many weights of each group are live."""
    return {group: sum(int(live[name].sum()) for name in group) for group in groups}


def drop_counts(live: Masks, budget: Counts, fraction: float) -> Counts:
    """How many live weights of each group stay: n - floor(fraction n), n = min(live, budget). RigL algorithm 1.

    A mask that has more weights in a group than its budget loses these, too.
    """
    now = {group: min(budget[group], count) for group, count in count_live(live, budget).items()}
    return {group: count - math.floor(fraction * count) for group, count in now.items()}


def grow(task_scores: TaskScores, live: Masks, budget: Counts, quorum: int = 1) -> Masks:
    """The live weights and, up to each group's budget, the inactive ones that the tasks want most, as `select` says.

    With |g_t| as scores and quorum 1 this is DiSparse's union of the tasks' own choices, cut at the budget; of one task,
    or of the summed losses, it is RigL's ArgTopK over i not in theta \\ I_drop of |g|, k. What was dropped just now is
    inactive and may be chosen, in RigL's algorithm 1 and code as in DiSparse's code.
    """
    missing = {group: budget[group] - count for group, count in count_live(live, budget).items()}
    grown = select(task_scores, {name: ~mask for name, mask in live.items()}, missing, quorum)
    return {name: mask | grown[name] for name, mask in live.items()}


class Dynamic(Method):
    """Prunes to the target at once, then drops and grows as many; the masks in force are all there is to remember.

    Masks that are there before, of a sparse model, are where it starts: they are brought to the budget by the first update.
    """

    @staticmethod
    def scorings(config: PruningConfig, max_steps: int) -> int:
        """For the first mask, and for each exchange once, twice if what is dropped is by gradients, too."""
        steps = update_steps(config, max_steps)
        last = int(bool(steps) and steps[-1] == end_of(config, max_steps))  # nothing is exchanged any more
        each = 1 if config.drop == "magnitude" else 2
        return int(config.criterion in GRADIENT_CRITERIA) + each * max(0, len(steps) - 1 - last)

    def update(self, now: Update) -> Masks | None:
        """None where nothing is dropped any more."""
        config, joint = self.config, self.config.decision == "joint"
        size = sum(mask.numel() for mask in now.masks.values())
        count = size - round(config.sparsity * size)
        budget = allocate(config.allocation, {name: mask.shape for name, mask in now.masks.items()}, count)
        if all(mask.all() for mask in now.masks.values()):
            return select(now.score(config.criterion, joint), now.masks, budget, config.quorum)
        kept = drop_counts(
            now.masks, budget, cosine_decay(now.step, config.start_step, self.last, config.drop_fraction)
        )
        if kept == budget == count_live(now.masks, budget):
            return None
        if config.drop == "magnitude":  # one opinion, which needs no quorum
            live = select(now.score("magnitude", True), now.masks, kept)
        else:
            live = select(now.score(config.criterion, joint), now.masks, kept, config.quorum)
        masks = grow(now.score("gradient", joint), live, budget, config.quorum)
        for name, mask in masks.items():
            forget(now.optimizer, now.parameters[name], mask & ~now.masks[name])
        return masks


def forget(optimizer: Optimizer | None, weight: torch.nn.Parameter, grown: Tensor) -> None:
    """Sets to zero what the optimizer holds for grown weights, number by number; that of others keeps its bits.

    Shapes: grown bool, as the weight. A weight that was dropped and grown again at once was never gone.
    """
    for value in optimizer.state.get(weight, {}).values() if optimizer else ():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
            zero_pruned(value, ~grown)
