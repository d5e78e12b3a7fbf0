"""Parts of an encoder that are pruned as a whole: heads, neurons, layers, channels and ranks. Pure functions.

A *site* is a place with parts of one kind, such as the heads of one layer's attention. Each of its modules has an
*owner* tensor, which assigns each row (dim 0) or column (dim 1) of the module's weight to a part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]  # parameter name -> weight-shaped


@dataclass(frozen=True)
class Site:
    """The number of parts, and module name -> (dim, owner), with owner (size of that dim,) int64 in 0..parts-1."""

    parts: int
    members: Mapping[str, tuple[int, Tensor]]


Sites = Mapping[str, Mapping[str, Site]]  # kind -> name of the site -> site


def channels(parameters: Mapping[str, Tensor]) -> dict[str, Site]:
    """Makes every matrix a site of its own, whose parts are its columns. Shapes: {parameter name: (rows, columns)}."""
    modules = {name.removesuffix(".weight"): weight.shape[1] for name, weight in parameters.items()}
    return {module: Site(columns, {module: (1, torch.arange(columns))}) for module, columns in modules.items()}


def sum_by_part(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    """Sums over the weights of each part: the part's score, or how many of its weights a mask keeps.

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
    """Masks of the site's weights without its pruned parts; what was pruned before stays pruned.

    Shapes: masks {parameter name: bool, weight-shaped}, keep (parts,) bool -> masks of the site's weights alone.
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
    """Applies `mask_of_parts` to sites of one kind, which share no weights."""
    return {k: mask for name, site in sites.items() for k, mask in mask_of_parts(masks, site, keep[name]).items()}


def matrix_shape(tensors: Mapping[str, Tensor], site: Site) -> tuple[int, int]:
    """(out, in) of the matrix that the site's factors make up: up (out, r), with dim 1, and down (r, in), with dim 0."""
    sizes = {dim: tensors[f"{module}.weight"].shape[1 - dim] for module, (dim, _) in site.members.items()}
    return sizes[1], sizes[0]


def parameters_saved(masks: Mapping[str, Tensor], sites: Mapping[str, Site]) -> tuple[int, int]:
    """(parameters that the masked factors save, negative while they are larger; D, the parameters of the dense matrices)."""
    dense = sum(rows * columns for rows, columns in (matrix_shape(masks, site) for site in sites.values()))
    kept = sum(int(masks[f"{module}.weight"].sum()) for site in sites.values() for module in site.members)
    return dense - kept, dense
