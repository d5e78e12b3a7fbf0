"""Parts of an encoder that can only go as a whole, as pure functions: attention heads, FFN neurons, layers. Layer 2.

A *site* is where parts of one kind live side by side: the heads of one layer's attention, say. Each of its modules has an
*owner* tensor that says to which part each row (dim 0) or column (dim 1) of the module's weight belongs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """`parts` parts, and module name -> (dim, owner), owner being (size of that dim,) int64 in 0..parts-1."""

    parts: int
    members: Mapping[str, tuple[int, Tensor]]


def channels(parameters: Mapping[str, Tensor]) -> dict[str, Site]:
    """Every matrix as a site of its own, whose parts are its columns. Shapes: {parameter name: (rows, columns)}."""
    modules = {name.removesuffix(".weight"): weight.shape[1] for name, weight in parameters.items()}
    return {module: Site(columns, {module: (1, torch.arange(columns))}) for module, columns in modules.items()}


def sum_by_part(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    """What all weights of a part add up to: a part's score, or how many of its weights a mask keeps.

    Shapes: {parameter name: weight-shaped} -> (parts,) float64.
    """
    total = None
    for module, (dim, owner) in site.members.items():
        weight = tensors[f"{module}.weight"]
        lines = weight.double().sum(dim=1 - dim)  # one number per row or column
        if total is None:
            total = torch.zeros(site.parts, dtype=torch.float64, device=weight.device)
        total.index_add_(0, owner.to(weight.device), lines)
    return total


def mask_of_parts(masks: Mapping[str, Tensor], site: Site, keep: Tensor) -> dict[str, Tensor]:
    """The masks of the site's weights once its pruned parts are gone; what was pruned before stays so.

    Shapes: masks {parameter name: bool, weight-shaped}, keep (parts,) bool -> those of `masks` that belong to the site.
    """
    result = {}
    for module, (dim, owner) in site.members.items():
        lines = keep.cpu()[owner]
        mask = masks[f"{module}.weight"]
        result[f"{module}.weight"] = mask & lines.to(mask.device).unsqueeze(1 - dim)
    return result


def masks_of_parts(
    masks: Mapping[str, Tensor], sites: Mapping[str, Site], keep: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`mask_of_parts` for sites of one kind, which share no weights."""
    return {k: mask for name, site in sites.items() for k, mask in mask_of_parts(masks, site, keep[name]).items()}


def matrix_shape(tensors: Mapping[str, Tensor], site: Site) -> tuple[int, int]:
    """(out, in) of the matrix whose factors are the site's: up (out, r), of dim 1, and down (r, in), of dim 0."""
    sizes = {dim: tensors[f"{module}.weight"].shape[1 - dim] for module, (dim, _) in site.members.items()}
    return sizes[1], sizes[0]


def parameters_saved(masks: Mapping[str, Tensor], sites: Mapping[str, Site]) -> tuple[int, int]:
    """How many parameters the factors save under their masks, below 0 while they are larger, and D, those of the matrices."""
    dense = sum(rows * columns for rows, columns in (matrix_shape(masks, site) for site in sites.values()))
    kept = sum(int(masks[f"{module}.weight"].sum()) for site in sites.values() for module in site.members)
    return dense - kept, dense
