"""Pruning the rank of matrices under one budget of parameters: which components of W = up @ down stay.

A component of a matrix (out, in) takes out + in parameters, so that components of unlike matrices compete by their score per
parameter. Sources: FLOP, Wang et al. 2020 (arXiv 1910.04732), the gated factorisation; Xia and Shin 2021 (arXiv 2112.05705)
prune ranks under a multitask objective with one budget of parameters for all matrices.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hf_disparse.pruning.parts import Site, sum_by_part


def parameter_budget(shapes: Iterable[tuple[int, int]], sparsity: float) -> int:
    """How many parameters all factors may have: D - round(sparsity * D), D = sum of out * in over the dense matrices."""
    dense = sum(rows * columns for rows, columns in shapes)
    return dense - round(sparsity * dense)


def matrix_shape(tensors: Mapping[str, Tensor], site: Site) -> tuple[int, int]:
    """(out, in) of the matrix whose factors are the site's: up (out, r), of dim 1, and down (r, in), of dim 0."""
    sizes = {dim: tensors[f"{module}.weight"].shape[1 - dim] for module, (dim, _) in site.members.items()}
    return sizes[1], sizes[0]


def parameters_saved(masks: Mapping[str, Tensor], sites: Mapping[str, Site]) -> tuple[int, int]:
    """How many parameters the factors save under their masks, below 0 while they are larger, and D, those of the matrices."""
    dense = sum(rows * columns for rows, columns in (matrix_shape(masks, site) for site in sites.values()))
    kept = sum(int(masks[f"{module}.weight"].sum()) for site in sites.values() for module in site.members)
    return dense - kept, dense


def score_per_parameter(scores: Mapping[str, Tensor], site: Site) -> Tensor:
    """Score of each component per parameter that it takes: sum of those of its weights / (out + in).

    Shapes: {parameter name: weight-shaped} -> (r,) float64.
    """
    return sum_by_part(scores, site) / sum(matrix_shape(scores, site))


def fill_budget(cost: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Goes through the components from the smallest cost, ties by position, and keeps each that still fits.

    The budget is missed by less than the largest component unless everything is kept, and no component that was left out
    would fit. Shapes: cost (N,), sizes (N,) int64 -> (N,) bool.
    """
    order = torch.sort(cost, stable=True).indices
    fits = torch.cumsum(sizes.to(order.device)[order], 0) <= budget
    keep = torch.zeros(len(cost), dtype=torch.bool, device=cost.device)
    keep[order[fits]] = True  # a cumulative sum of positive sizes only grows: a prefix
    left = budget - int(sizes.to(cost.device)[keep].sum())
    rest = order[~fits].tolist()
    for i, size in zip(rest, sizes.cpu()[rest].tolist(), strict=True):
        if size <= left:
            keep[i], left = True, left - size
    return keep
