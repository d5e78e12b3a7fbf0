"""Bootstrap intervals of agreement: it is measured again on resampled scoring batches and weights.

A draw takes, with replacement, as many scoring batches as there are, separately for each task, and as many weights as the sample
has, the same for all tasks. Masks are cut again at the budget. Source: Efron 1979 (Annals of Statistics 7). A draw sees fewer
distinct batches, so its scores are noisier and agreement is lower. Hence the intervals take their spread from the draws but are
centred on the value measured on all data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_disparse.analysis.agreement import WHOLE, Tally, add, agreement, by_layer, count, overlaps, summed_by_layer
from hf_disparse.analysis.names import layer_and_kind
from hf_disparse.analysis.watershed import middle, watershed, watershed_interval
from hf_disparse.pruning.decision import keep_smallest

SAMPLE = 1 << 18  # weights
DRAWS = 200


@dataclass(frozen=True)
class Sampled:
    """One task's statistics on the sampled weights, batch by batch.

    Args:
        batches: parameter name -> (batches, n), what each batch adds to the statistic of the criterion.
        weights: parameter name -> (n,), their values.
        score: (weights (n,), statistic summed over batches (n,)) -> scores (n,); a criterion of `hf_disparse.pruning.scores`.
    """

    batches: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    score: Callable[[Tensor, Tensor], Tensor]


def draw_sample(live: Mapping[str, Tensor], size: int = SAMPLE, seed: int = 0) -> dict[str, Tensor]:
    """Draws the same share of the live weights of every matrix, `size` in all, or all if there are fewer.

    Shapes: {parameter name: bool, weight-shaped} -> {parameter name: (n,) int64, sorted positions in the flat weight}.
    """
    counts = {name: int(torch.count_nonzero(alive)) for name, alive in live.items()}
    share = min(1.0, size / max(1, sum(counts.values())))
    generator = torch.Generator().manual_seed(seed)
    sample = {}
    for name, alive in live.items():
        wanted = math.ceil(share * counts[name])
        places = alive.reshape(-1).cpu().nonzero().squeeze(1) if counts[name] < alive.numel() else None
        if wanted < counts[name]:
            drawn = torch.randperm(counts[name], generator=generator)[:wanted].sort().values
        else:
            drawn = torch.arange(counts[name])
        sample[name] = drawn if places is None else places[drawn]
    return sample


def take(tensors: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Picks the sampled entries, as float32 on the CPU. Shapes: {name: weight-shaped}, {name: (n,)} -> {name: (n,)}."""
    return {
        name: tensors[name].detach().reshape(-1)[where.to(tensors[name].device)].float().cpu()
        for name, where in sample.items()
    }


def bootstrap(samples: Mapping[str, Sampled], sparsity: float, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Agreement beyond chance in every draw, (draws, groups, sets), groups and sets as in the rows of `agreement`.

    Args:
        samples: task -> its statistics, on the same weights for all tasks.
        sparsity: the budget of a task's own mask.
    """
    tasks, generator = tuple(samples), torch.Generator().manual_seed(seed)
    names = [name for name, column in next(iter(samples.values())).weights.items() if len(column)]
    where = layer_and_kind(names)
    sizes = [len(next(iter(samples.values())).weights[name]) for name in names]
    kept = sum(sizes) - round(sparsity * sum(sizes))
    flat = [
        (torch.cat([s.batches[n] for n in names], 1), torch.cat([s.weights[n] for n in names]), s.score)
        for s in samples.values()
    ]
    found = []
    for _ in range(draws):
        masks = []
        for batches, weights, score in flat:
            drawn = torch.randint(len(batches), (len(batches),), generator=generator)
            often = torch.bincount(drawn, minlength=len(batches)).float()
            masks.append(keep_smallest(-score(weights, often @ batches), kept).split(sizes))
        often = torch.randint(sum(sizes), (sum(sizes),), generator=generator)
        times = torch.bincount(often, minlength=sum(sizes)).float().split(sizes)
        counted: dict = {}
        for i, name in enumerate(names):
            if name in where:
                add(counted, where[name], *count([mask[i] for mask in masks], times=times[i]))
        found.append(summed_by_layer(tasks, counted))
    return torch.stack([overlaps(drawn.pairs, drawn.votes)[2] for drawn in found])


def with_intervals(counts: Tally, drawn: Tensor) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of `agreement` with `low` and `high`, and the watershed with its interval.

    Args:
        counts: the tally of the whole masks.
        drawn: the result of `bootstrap`; its spread is centred on the agreement in `counts`.

    Returns:
        The rows, and {"layer", "low", "high", "share"}: layers or None, and the share of draws with a watershed. Unless
        that is at least half, the layers are None.
    """
    rows = agreement(counts)
    spread = drawn - drawn.mean(0)
    ends = spread.sort(0).values[list(middle(len(spread)))]  # (2, groups, sets)
    for row, (low, high) in zip(rows, ends.flatten(1).T.tolist(), strict=True):
        row["low"], row["high"] = row["beyond_chance"] + low, min(1.0, row["beyond_chance"] + high)
    layers, curve = by_layer(counts)
    whole = [g for g, (_, kind) in enumerate(counts.groups) if kind == WHOLE]
    curves = (torch.tensor(curve) + spread[:, whole, -1]).tolist() if curve else []
    return rows, placed(layers, curve, curves)


def placed(layers: Sequence[int], curve: Sequence[float], curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The watershed of a curve over `layers`, with its interval from resampled `curves`, as `with_intervals` returns it."""
    place, (low, high, share) = watershed(curve), watershed_interval(curves)
    if place is None or share < 0.5:
        return {"layer": None, "low": None, "high": None, "share": share}
    return {"layer": layers[place], "low": layers[low], "high": layers[high], "share": share}
