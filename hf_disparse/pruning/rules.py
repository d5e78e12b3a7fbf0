"""What a `PruningConfig` and the tasks' scores decide: masks of weights, or of parts that are pruned as a whole."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.pruning import decision
from hf_disparse.pruning.parts import Sites, masks_of_parts, sum_by_part


def decide_by(config: PruningConfig, task_scores, sparsity: float, active=None, cut=None) -> decision.Masks:
    """Returns the masks that `config.decision` makes of the scores; arguments as in `decision.decide`."""
    rule = {
        "unanimous": decision.decide,
        "joint": decision.decide,  # a single task: the scores are those of the summed losses
        "quorum": partial(decision.decide, quorum=config.quorum),
        "sum": decision.decide_sum,
        "max": decision.decide_max,
        "mean_rank": decision.decide_mean_rank,
    }[config.decision]
    return rule(task_scores, sparsity, active=active, cut=cut)


def decide_parts(
    config: PruningConfig,
    task_scores: Iterable[tuple[str, Mapping[str, Tensor]]],
    sparsity: float,
    active: decision.Masks,
    sites: Sites,
) -> decision.Masks:
    """Returns the masks of the weights that prune `round(sparsity * parts)` parts of each kind.

    May prune more than asked: if a layer is pruned after heads or neurons elsewhere, those stay pruned.

    A part's score for a task is the sum of its weights' scores; `config.decision` decides over parts as over weights. The
    best part of every site stays, by the same rule, as an encoder needs a head in each layer.

    Args:
        task_scores: (task, scores of the weights), consumed one at a time.
        active: the masks so far; what they prune stays pruned and counts.
    """

    def of_parts(scores: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {kind: {name: sum_by_part(scores, site) for name, site in p.items()} for kind, p in sites.items()}

    by_part = [(task, of_parts(scores)) for task, scores in task_scores]
    return decide_scored_parts(config, by_part, sparsity, active, sites)


def decide_scored_parts(
    config: PruningConfig,
    by_part: list[tuple[str, Mapping[str, dict[str, Tensor]]]],
    sparsity: float,
    active: decision.Masks,
    sites: Sites,
) -> decision.Masks:
    """Does what `decide_parts` does, from scores of parts: (task, kind -> site -> (parts,))."""
    masks = dict(active)
    # Layers first: heads and neurons of a pruned layer count as pruned.
    for kind in sorted(sites, key=lambda kind: kind != "layer"):
        places = sites[kind]
        live = {name: sum_by_part(masks, site) > 0 for name, site in places.items()}
        keep = keep_parts(config, kind, [(task, scores[kind]) for task, scores in by_part], sparsity, live)
        masks |= masks_of_parts(masks, places, keep)
    return masks


def keep_parts(
    config: PruningConfig,
    kind: str,
    task_scores: list[tuple[str, dict[str, Tensor]]],
    sparsity: float,
    live: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Returns which parts of one kind stay. Shapes: per site (parts,) scores and bools -> (parts,) bools.

    Parts that are not `live` count as pruned; a site without a live part keeps none.

    Raises:
        UserError: the sparsity would leave a site without any part.
    """
    count = parts_to_prune(kind, [len(alive) for alive in live.values()], sparsity)
    if count <= sum(int((~alive).sum()) for alive in live.values()):
        return {name: alive.clone() for name, alive in live.items()}
    best = best_parts(config, task_scores, live)
    rest = sum(int((~stays).sum()) for stays in best.values())
    if count == rest:
        return best
    return keep_of_the_rest(config, task_scores, best, live, sparsity=count / rest)


def keep_of_the_rest(
    config: PruningConfig,
    task_scores: list[tuple[str, dict[str, Tensor]]],
    best: dict[str, Tensor],
    live: dict[str, Tensor],
    sparsity: float = 0.0,
    cut: decision.Cut | None = None,
) -> dict[str, Tensor]:
    """Returns the parts of `best_parts` and those that `config.decision` keeps of the others; arguments as in `decide_by`."""
    others = [(task, {name: by_site[name][~best[name]] for name in best}) for task, by_site in task_scores]
    chosen = decide_by(config, others, sparsity, {name: live[name][~best[name]] for name in best}, cut)
    return {name: keep.masked_scatter(~keep, chosen[name]) for name, keep in best.items()}


def best_parts(
    config: PruningConfig, task_scores: list[tuple[str, dict[str, Tensor]]], live: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the best part of every site that has a live one. Shapes as in `keep_parts`."""
    best = {name: alive.clone() for name, alive in live.items()}
    for name, alive in live.items():
        if alive.any():
            scores = [(task, {name: by_site[name]}) for task, by_site in task_scores]
            best |= decide_by(config, scores, 1 - 1 / len(alive), active={name: alive})
    return best


def parts_to_prune(kind: str, parts: Sequence[int], sparsity: float) -> int:
    """Returns how many parts of a kind a sparsity prunes, given their number at each site.

    Raises:
        UserError: the sparsity would leave a site without any part.
    """
    size = sum(parts)
    count, most = round(sparsity * size), size - len(parts)
    if count > most:
        raise UserError(
            f"pruning.sparsity: expected at most {most / size:.3f}, as one {kind} of each of {len(parts)} sites stays, "
            f"got {sparsity}"
        )
    return count
