"""How much the tasks' own masks agree, beyond chance. Pure functions on masks.

For a set of tasks and a set of weights (a matrix, a layer), where p_t is the share that task t keeps:

    IoU    = |kept by all of them| / |kept by any of them|
    c      = prod_t p_t / (1 - prod_t (1 - p_t)), the IoU of independent masks of these densities
    beyond = (IoU - c) / (1 - c), 0 = chance, 1 = identical

Two independent masks of density p already have an IoU of c = p / (2 - p), which is why IoU alone says little. Where c is 1 (all
keep everything, or none keeps anything) the masks are identical, and `beyond` is 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from hf_disparse.analysis.names import layer_and_kind

TaskMasks = Mapping[str, Mapping[str, Tensor]]  # task -> parameter name -> bool, True = keep
WHOLE = "all"  # the kind that stands for all matrices of a layer
_CHUNK = 1 << 22  # weights counted at once in float32, which is exact below 2^24


@dataclass(frozen=True)
class Tally:
    """The counts behind agreement and keepers, for G groups of weights and T tasks.

    Args:
        groups: (layer, kind) of each; kind `all` is the whole layer.
        pairs: (G, T, T), the number of weights that both tasks keep; on the diagonal, that one task keeps.
        votes: (G, T + 1), the number of weights kept by 0, 1, ..., T tasks.
    """

    tasks: tuple[str, ...]
    groups: tuple[tuple[int, str], ...]
    pairs: Tensor
    votes: Tensor


def tally(masks: TaskMasks, live: Mapping[str, Tensor] | None = None) -> Tally:
    """Counts per matrix and per layer, first to last, without matrices that have no live weight.

    Args:
        masks: all tasks' masks of the same parameters, whose names `layer_and_kind` reads.
        live: a mask; weights that are False here do not count at all.
    """
    tasks, counted = tuple(masks), {}
    names = list(next(iter(masks.values())))
    for name, place in layer_and_kind(names).items():
        alive = None if live is None else live[name].reshape(-1)
        rows = [mask[name].reshape(-1) for mask in masks.values()]
        add(counted, place, *count(rows, alive))
    return summed_by_layer(tasks, {place: held for place, held in counted.items() if held[1].sum() > 0})


def add(counted: dict, place: tuple[int, str], pairs: Tensor, votes: Tensor) -> None:
    """Adds to the counts of a (layer, kind), in place."""
    held = counted.get(place)
    counted[place] = (pairs, votes) if held is None else (held[0] + pairs, held[1] + votes)


def summed_by_layer(tasks: tuple[str, ...], counted: Mapping[tuple[int, str], tuple[Tensor, Tensor]]) -> Tally:
    """Orders the counts of matrices by layer, each layer's followed by their sum."""
    groups, pairs, votes = [], [], []
    for layer in sorted({layer for layer, _ in counted}):
        mine = {place: held for place, held in counted.items() if place[0] == layer}
        groups += [*mine, (layer, WHOLE)]
        for part, lists in ((0, pairs), (1, votes)):
            own = [held[part] for held in mine.values()]
            lists += [*own, sum(own)]
    size = len(tasks)
    return Tally(
        tasks,
        tuple(groups),
        torch.stack(pairs) if pairs else torch.zeros(0, size, size, dtype=torch.float64),
        torch.stack(votes) if votes else torch.zeros(0, size + 1, dtype=torch.float64),
    )


def count(masks: Sequence[Tensor], live: Tensor | None = None, times: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`pairs` and `votes` of one group, as in `Tally`.

    Shapes: masks (n,) bool, one per task, live (n,) bool, times (n,) float32: how often each weight counts, by default once.
    """
    tasks, n = len(masks), len(masks[0])
    pairs = torch.zeros(tasks, tasks, dtype=torch.float64)
    votes = torch.zeros(tasks + 1, dtype=torch.float64)
    for start in range(0, n, _CHUNK):
        part = slice(start, start + _CHUNK)
        kept = torch.stack([mask[part] for mask in masks])
        weight = None if times is None else times[part]
        if live is not None:
            kept = kept & live[part]
            weight = live[part].float() if weight is None else weight * live[part]
        kept = kept.float()
        pairs += ((kept if weight is None else kept * weight) @ kept.T).double().cpu()
        votes += torch.bincount(kept.sum(0).int(), weights=weight, minlength=tasks + 1).double().cpu()
    return pairs, votes


def sets_of(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """Every pair of tasks, then the set of all if that is larger than a pair."""
    return [*combinations(tasks, 2), *([tuple(tasks)] if len(tasks) > 2 else [])]


def overlaps(pairs: Tensor, votes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, chance c and agreement beyond chance, for every set of tasks.

    Shapes: pairs (..., T, T), votes (..., T + 1) -> (..., sets), in the order of `sets_of`.
    """
    tasks, size = pairs.shape[-1], votes.sum(-1, keepdim=True)
    kept = pairs.diagonal(dim1=-2, dim2=-1)  # (..., T)
    density = kept / size.clamp_min(1e-300)
    first, second = torch.triu_indices(tasks, tasks, 1)
    both = pairs[..., first, second]
    either = kept[..., first] + kept[..., second] - both
    p, q = density[..., first], density[..., second]
    by_chance, any_by_chance = p * q, 1 - (1 - p) * (1 - q)
    if tasks > 2:
        both = torch.cat([both, votes[..., -1:]], -1)
        either = torch.cat([either, size - votes[..., :1]], -1)
        by_chance = torch.cat([by_chance, density.prod(-1, keepdim=True)], -1)
        any_by_chance = torch.cat([any_by_chance, 1 - (1 - density).prod(-1, keepdim=True)], -1)
    iou, chance = _share(both, either), _share(by_chance, any_by_chance)
    return iou, chance, beyond_chance(iou, chance)


def beyond_chance(iou: Tensor, chance: Tensor) -> Tensor:
    """(IoU - c) / (1 - c); 1 where c is 1. Shapes alike."""
    return torch.where(chance < 1, (iou - chance) / (1 - chance).clamp_min(1e-300), 1.0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 1 for 0 / 0, because masks that keep nothing are identical."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-300), 1.0)


def agreement(masks: TaskMasks | Tally, live: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
    """One row per matrix, and per layer with kind `all`, for every pair of tasks and for all tasks together.

    Args:
        masks: task -> parameter name -> bool, or the counts from `tally`.
        live: as in `tally`.

    Returns:
        Rows {"layer", "kind", "tasks", "iou", "chance", "beyond_chance", "low", "high"}; the last two are None until
        `hf_disparse.analysis.bootstrap.with_intervals` fills them in. No rows for a single task.
    """
    counts = masks if isinstance(masks, Tally) else tally(masks, live)
    columns = [values.tolist() for values in overlaps(counts.pairs, counts.votes)]
    return [
        {
            "layer": layer,
            "kind": kind,
            "tasks": list(names),
            **{key: column[g][i] for key, column in zip(("iou", "chance", "beyond_chance"), columns, strict=True)},
            "low": None,
            "high": None,
        }
        for g, (layer, kind) in enumerate(counts.groups)
        for i, names in enumerate(sets_of(counts.tasks))
    ]


def by_layer(counts: Tally) -> tuple[list[int], list[float]]:
    """The layers, and for each the agreement of all tasks beyond chance: the curve for `watershed`."""
    whole = [g for g, (_, kind) in enumerate(counts.groups) if kind == WHOLE]
    values = overlaps(counts.pairs, counts.votes)[2]
    return [counts.groups[g][0] for g in whole], values[whole, -1].tolist() if values.shape[-1] else []
