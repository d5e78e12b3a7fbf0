"""Pruning the rank of matrices under one budget of parameters: which components of W = up @ down stay: `method: rank`.

A component of a matrix (out, in) takes out + in parameters, so components of different matrices compete by their score per
parameter. Sources: the factorisation is that of FLOP, Wang et al. 2020 (arXiv 1910.04732); Xia and Shin 2021 (arXiv
2112.05705) prune ranks under a multitask objective with one budget of parameters for all matrices.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.methods.base import Method, Update
from hf_disparse.methods.saliency import Saliency
from hf_disparse.model.factorise import factorise, is_factorised
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.parts import Site, Sites, masks_of_parts, matrix_shape, parameters_saved, sum_by_part
from hf_disparse.pruning.rules import best_parts, keep_of_the_rest
from hf_disparse.pruning.schedule import sparsity_at


def parameter_budget(shapes: Iterable[tuple[int, int]], sparsity: float) -> int:
    """Returns how many parameters all factors may have: D - round(sparsity * D), D = sum of out * in over the dense matrices."""
    dense = sum(rows * columns for rows, columns in shapes)
    return dense - round(sparsity * dense)


def score_per_parameter(scores: Mapping[str, Tensor], site: Site) -> Tensor:
    """Returns the score of each component per parameter: the sum of its weights' scores / (out + in).

    Shapes: {parameter name: weight-shaped} -> (r,) float64.
    """
    return sum_by_part(scores, site) / sum(matrix_shape(scores, site))


def fill_budget(cost: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Goes through the components from the smallest cost, ties by position, and keeps each one that still fits.

    The budget is missed by less than the largest component unless everything is kept, and none of the components left out
    would fit. Shapes: cost (N,), sizes (N,) int64 -> (N,) bool.
    """
    order = torch.sort(cost, stable=True).indices
    fits = torch.cumsum(sizes.to(order.device)[order], 0) <= budget
    keep = torch.zeros(len(cost), dtype=torch.bool, device=cost.device)
    keep[order[fits]] = True  # a prefix, since a cumulative sum of positive sizes only grows
    left = budget - int(sizes.to(cost.device)[keep].sum())
    rest = order[~fits].tolist()
    for i, size in zip(rest, sizes.cpu()[rest].tolist(), strict=True):
        if size <= left:
            keep[i], left = True, left - size
    return keep


def _take_live(cost: Tensor, sizes: Tensor, live: Tensor, budget: int) -> Tensor:
    """Applies `fill_budget` to the components that are not pruned yet."""
    sizes = torch.where(live.cpu(), sizes, budget + 1)  # does not fit
    return fill_budget(cost, sizes, budget)


class Rank(Method):
    """Scores the factors as they are, task by task, and decides over components; what is pruned stays pruned."""

    @staticmethod
    def scorings(config: PruningConfig, max_steps: int) -> int:
        """Scores by the same criteria and as often as pruning by scores."""
        return Saliency.scorings(config, max_steps)

    def prepare(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Replaces every matrix to be pruned by two factors."""
        if is_factorised(model, self.config):
            return
        if optimizer is not None:
            raise UserError(
                "pruning.method: rank replaces matrices by new modules, but the optimizer already holds the old ones; call "
                "factorise(model, config) before you create it, and pass the callback to the Trainer by callbacks=[...]"
            )
        factorise(model, self.config)

    def check(self, parameters: Mapping[str, Tensor], sites: Sites) -> None:
        """Raises UserError if the budget does not hold one component of every matrix."""
        places = sites.get("rank", {})
        factors = {f"{module}.weight" for site in places.values() for module in site.members}
        shapes = [matrix_shape(parameters, site) for site in places.values()]
        shapes += [tuple(p.shape) for name, p in parameters.items() if name not in factors]  # not factorised yet
        dense, least = sum(rows * columns for rows, columns in shapes), sum(rows + columns for rows, columns in shapes)
        if parameter_budget(shapes, self.config.sparsity) < least:
            raise UserError(
                f"pruning.sparsity: expected at most {1 - least / dense:.3f}, because one component of each of the "
                f"{len(shapes)} matrices stays, got {self.config.sparsity}"
            )

    def allowed(self, step: int, masks: Mapping[str, Tensor], sites: Sites) -> int:
        """Returns how many parameters the factors may have from this step on.

        A gradual schedule starts from their number at full rank, which is larger than that of the dense matrices.
        """
        places = sites["rank"].values()
        shapes = [matrix_shape(masks, site) for site in places]
        full = sum(site.parts * sum(shape) for site, shape in zip(places, shapes, strict=True))
        last = parameter_budget(shapes, self.config.sparsity)
        share = sparsity_at(self.config, step, self.max_steps) / self.config.sparsity
        return last + int(max(full - last, 0) * (1 - share))

    def sparsity_at(self, step: int, masks: Masks, sites: Sites) -> float:
        """Returns the fraction of the dense matrices that `allowed` saves; below 0 while the factors are larger."""
        dense = sum(rows * columns for rows, columns in (matrix_shape(masks, site) for site in sites["rank"].values()))
        return 1 - self.allowed(step, masks, sites) / dense

    def update(self, now: Update) -> Masks | None:
        """Returns None if the model is that small already."""
        sites = now.sites["rank"]
        saved, dense = parameters_saved(now.masks, sites)
        if dense - saved <= self.allowed(now.step, now.masks, now.sites):
            return None
        stream = now.score(self.config.criterion, self.config.decision == "joint")
        scores = [
            (task, {name: score_per_parameter(by_weight, site) for name, site in sites.items()})
            for task, by_weight in stream
        ]
        return self.decide(scores, now)

    def decide(self, scores: list[tuple[str, dict[str, Tensor]]], now: Update) -> Masks:
        """Returns the masks that fill the budget, by the (r,) scores of the components of each matrix, task by task.

        The best component of each matrix stays, and of the others whatever fits, in the order that `config.decision` gives.
        """
        config, sites = self.config, now.sites["rank"]
        allowed = self.allowed(now.step, now.masks, now.sites)
        live = {name: sum_by_part(now.masks, site) > 0 for name, site in sites.items()}
        sizes = {name: sum(matrix_shape(now.masks, site)) for name, site in sites.items()}
        keep = best_parts(config, scores, live)
        spent = sum(int(kept.sum()) * sizes[name] for name, kept in keep.items())
        each = torch.cat([torch.full((int((~keep[name]).sum()),), sizes[name]) for name in keep])
        left = torch.cat([live[name][~keep[name]] for name in keep])
        cut = partial(_take_live, sizes=each, live=left, budget=max(allowed - spent, 0))
        return now.masks | masks_of_parts(now.masks, sites, keep_of_the_rest(config, scores, keep, live, cut=cut))


METHOD = Rank
