"""Criteria that score a part as a whole by the gradients of its weights: Taylor, and agreement of the tasks.

Notation: G is a part (of a site, of a kind), w_G its weights, g_t,b the gradient of task t on batch b with respect to all
weights, g_t its sum over the batches.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_disparse.pruning.parts import Site, Sites, Tensors, sum_by_part

PartScores = dict[str, dict[str, Tensor]]  # kind -> site -> (parts,) float64


def taylor(weights: Tensors, gradients: Iterable[Tensors], sites: Sites) -> PartScores:
    """sum_b (sum over w in G of w g_b)^2: the first-order change of a batch's loss when the part goes, squared, summed over b.

    Source: Molchanov et al. 2019 (arXiv 1906.10771), the importance of a group, with its weights instead of a gate.

    Args:
        gradients: one batch at a time.
    """
    total: PartScores = {}
    for batch in gradients:
        _add_taylor(total, weights, batch, sites)
    return total


def agreement_and_need(
    weights: Tensors, task_gradients: Iterable[tuple[str, Iterable[Tensors]]], sites: Sites
) -> tuple[PartScores, PartScores]:
    """How much the tasks agree on each part, and how much they need it; `agreement_score` combines the two.

        A_G = || sum_t g_t,G / ||g_t,G|| ||^2 = T + 2 sum over pairs of cos(g_s,G, g_t,G), in [0, T^2]
        N_G = sum_t T_t,G / sum over parts of the kind of T_t,.                            by `taylor`

    A task without a gradient on a part does not count there. Source: our reading of the gradient-based criterion of Garg et
    al. 2023 (arXiv 2304.06840), of which we know only the abstract; the equations are ours.

    Args:
        task_gradients: (task, its gradients batch by batch), consumed one at a time.

    Returns:
        A and N. Memory: two buffers of the weights' size for any number of tasks (one more if parts of layers are pruned
        besides whole layers).
    """
    direction: dict[str, dict[str, Tensor]] = {kind: {} for kind in sites}  # sum over tasks so far of g / ||g||
    need: PartScores = {}
    for _, gradients in task_gradients:
        summed: dict[str, Tensor] = {}
        of_task: PartScores = {}
        for batch in gradients:
            _add_taylor(of_task, weights, batch, sites)
            for name, gradient in batch.items():
                summed[name] = summed[name].add_(gradient) if name in summed else gradient.clone()
        for kind, places in sites.items():
            for site in places.values():
                _add_direction(direction[kind], summed, site)
            whole = sum(float(of_task[kind][name].sum()) for name in places) or 1.0
            for name in places:
                _add(need, kind, name, of_task[kind][name] / whole)
    agreed = {kind: {name: _squares(direction[kind], site) for name, site in p.items()} for kind, p in sites.items()}
    return agreed, need


def agreement_score(agreed: PartScores, need: PartScores) -> PartScores:
    """A_G N_G: low for a part that no task needs, even if they agree on it, and for one that they pull in opposite ways."""
    return {kind: {name: agreed[kind][name] * need[kind][name] for name in places} for kind, places in agreed.items()}


def _add_taylor(total: PartScores, weights: Tensors, gradients: Tensors, sites: Sites) -> None:
    product = {name: gradient * weights[name].detach() for name, gradient in gradients.items()}
    for kind, places in sites.items():
        for name, site in places.items():
            _add(total, kind, name, sum_by_part(product, site).square())


def _add_direction(total: dict[str, Tensor], summed: Tensors, site: Site) -> None:
    """Adds g_G / ||g_G|| of every part of the site, in place; adds 0 where the gradient is 0."""
    norm = _squares(summed, site).sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    for module, (dim, owner) in site.members.items():
        name = f"{module}.weight"
        unit = summed[name] * scale[owner.to(scale.device)].to(summed[name].dtype).unsqueeze(1 - dim)
        total[name] = total[name].add_(unit) if name in total else unit


def _squares(tensors: Tensors, site: Site) -> Tensor:
    """||x_G||^2 of every part, (parts,), in float64 because squares of small gradients underflow in float32."""
    own = [f"{module}.weight" for module in site.members]
    return sum_by_part({name: tensors[name].double().square() for name in own}, site)


def _add(total: PartScores, kind: str, name: str, value: Tensor) -> None:
    held = total.setdefault(kind, {})
    held[name] = held[name] + value if name in held else value
