"""Dynamic sparse training: how many weights each matrix has, which are dropped, which grow instead: `method: dynamic`.

Sources: RigL, Evci et al. 2020 (arXiv 1911.11134), section 3 and algorithm 1; the dynamic variant of DiSparse, Sun et al. 2022
(arXiv 2206.04662), in which every task looks for the weights to grow on its own.

A *group* is a tuple of parameter names within which weights compete: one matrix, or all of them. *Counts* are {group: number
of weights}. A mask is {parameter name: bool tensor}, True = live.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_disparse.config import PruningConfig
from hf_disparse.methods.base import Method, Update
from hf_disparse.pruning.decision import (
    Flat,
    Masks,
    TaskScores,
    decide_masks,
    keep_smallest,
    pairs,
    quorum_rank,
    task_ranks,
)
from hf_disparse.pruning.masks import zero_pruned
from hf_disparse.pruning.schedule import cosine_decay, end_of, update_steps
from hf_disparse.pruning.scores import GRADIENT_CRITERIA

Shapes = Mapping[str, Sequence[int]]
Counts = dict[tuple[str, ...], int]


def allocate(allocation: str, shapes: Shapes, count: int) -> Counts:
    """Distributes `count` live weights over the matrices: by `erk`, `uniform`, or `global`, which leaves it to the scores.

    Shapes: {name: (n_out, n_in)} -> counts that add up to `count` exactly.
    """
    if allocation == "global":
        return {tuple(shapes): count}
    shares = {"erk": erdos_renyi, "uniform": uniform}[allocation](shapes, count)
    return {(name,): number for name, number in round_to(shares, count).items()}


def erdos_renyi(shapes: Shapes, count: int) -> dict[str, float]:
    """Returns live weights per matrix, real numbers: min(n_in n_out, eps (n_in + n_out)), eps such that they add up to `count`.

    The density is eps (n_in + n_out) / (n_in n_out), RigL section 3 (1): the larger the matrix, the sparser. What a dense
    matrix cannot take goes to the others by the same rule.
    """
    dense: dict[str, float] = {}
    while True:
        rest = {name: shape for name, shape in shapes.items() if name not in dense}
        eps = (count - sum(dense.values())) / max(1, sum(sum(shape) for shape in rest.values()))
        full = {name: float(math.prod(shape)) for name, shape in rest.items() if eps * sum(shape) >= math.prod(shape)}
        if not full:  # eps only grows with every round, so what is dense stays dense
            return {name: dense.get(name, eps * sum(shape)) for name, shape in shapes.items()}
        dense |= full


def uniform(shapes: Shapes, count: int) -> dict[str, float]:
    """Returns live weights per matrix, real numbers, at the same density everywhere."""
    size = sum(math.prod(shape) for shape in shapes.values())
    return {name: count * math.prod(shape) / size for name, shape in shapes.items()}


def round_to(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """Returns whole numbers that add up to `count`: rounded down, plus one for the largest remainders, ties by position."""
    whole = {name: math.floor(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: whole[name] - shares[name])
    for name in by_remainder[: count - sum(whole.values())]:
        whole[name] += 1
    return whole


def select(task_scores: TaskScores, among: Masks, counts: Counts, quorum: int = 1) -> Masks:
    """Chooses in each group the `counts` weights in `among` that at least `quorum` tasks want most.

    R_t(w) is the rank of w for task t among the eligible weights of its group: 0 = highest score, last where the score is 0.
    Chosen are the weights with the smallest m-th smallest R_t(w) over the tasks, m being the quorum: min_t R_t(w) for unanimous
    pruning. It makes the first mask, from all weights, and the drop, where the chosen live weights stay: with |w| as the
    scores of one task, that is the complement of RigL's ArgTopK(-|w|, k).

    Args:
        task_scores: task -> scores, or an iterable of such pairs, consumed one at a time.
        among: the weights that may be chosen, at least `counts` in each group.

    Raises:
        ValueError: scores that are not finite, a quorum above the number of tasks.

    Memory beyond one task's scores: as `decide`, but the sort's temporaries are of one group only.
    """
    sizes = [sum(among[name].numel() for name in group) for group in counts]
    names = [name for group in counts for name in group]

    def rank(scores: Tensor, eligible: Tensor) -> Tensor:
        groups = zip(scores.split(sizes), eligible.split(sizes), strict=True)
        return torch.cat([task_ranks(*group) for group in groups])

    def cost(tasks: Iterator[Flat]) -> Tensor:
        return quorum_rank((rank(scores, eligible) for scores, eligible in tasks), quorum)

    def cut(costs: Tensor) -> Tensor:
        groups = zip(costs.split(sizes), counts.values(), strict=True)
        return torch.cat([keep_smallest(*group) for group in groups])

    by_group = ((task, {name: scores[name] for name in names}) for task, scores in pairs(task_scores))
    return decide_masks(by_group, cost, cut, {name: among[name] for name in names})


def count_live(live: Masks, groups: Iterable[tuple[str, ...]]) -> Counts:
    """Counts the live weights of each group."""
    return {group: sum(int(live[name].sum()) for name in group) for group in groups}


def drop_counts(live: Masks, budget: Counts, fraction: float) -> Counts:
    """Returns how many live weights of each group stay: n - floor(fraction n), n = min(live, budget). RigL algorithm 1.

    A group with more live weights than its budget loses the excess, too.
    """
    now = {group: min(budget[group], count) for group, count in count_live(live, budget).items()}
    return {group: count - math.floor(fraction * count) for group, count in now.items()}


def grow(task_scores: TaskScores, live: Masks, budget: Counts, quorum: int = 1) -> Masks:
    """Adds to the live weights, up to each group's budget, the inactive ones that the tasks want most, chosen by `select`.

    With |g_t| as scores and quorum 1 this is DiSparse's union of the tasks' own choices, cut at the budget; with one task,
    or the summed losses, it is RigL's ArgTopK over i not in theta \\ I_drop of |g|, k. What was dropped just now is
    inactive and may be chosen, as in RigL's algorithm 1, its code and DiSparse's code.
    """
    missing = {group: budget[group] - count for group, count in count_live(live, budget).items()}
    grown = select(task_scores, {name: ~mask for name, mask in live.items()}, missing, quorum)
    return {name: mask | grown[name] for name, mask in live.items()}


def reset_optimizer_state(optimizer: Optimizer | None, weight: torch.nn.Parameter, grown: Tensor) -> None:
    """Sets to zero what the optimizer holds for grown weights; what it holds for the others keeps its bits.

    Shapes: grown bool, as the weight. A weight that was dropped and grown again at once does not count as grown.
    """
    for value in optimizer.state.get(weight, {}).values() if optimizer else ():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
            zero_pruned(value, ~grown)


class Dynamic(Method):
    """Prunes to the target at once, then drops and grows the same number; the masks in force are its whole state.

    Training a sparse model starts from its masks, and the first update brings them to the budget.
    """

    @staticmethod
    def scorings(config: PruningConfig, max_steps: int) -> int:
        """Scores for the first mask and once for each exchange, twice if gradients also decide what is dropped."""
        steps = update_steps(config, max_steps)
        last = int(bool(steps) and steps[-1] == end_of(config, max_steps))  # when nothing is exchanged
        each = 1 if config.drop == "magnitude" else 2
        return int(config.criterion in GRADIENT_CRITERIA) + each * max(0, len(steps) - 1 - last)

    def update(self, now: Update) -> Masks | None:
        """Returns None once nothing is dropped any more."""
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
            reset_optimizer_state(now.optimizer, now.parameters[name], mask & ~now.masks[name])
        return masks


METHOD = Dynamic
