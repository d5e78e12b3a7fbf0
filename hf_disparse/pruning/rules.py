"""From a `PruningConfig` and the tasks' scores to masks: of weights, or of parts that go as a whole."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.pruning import decision
from hf_disparse.pruning.masks import count_pruned
from hf_disparse.pruning.parts import Sites, masks_of_parts, parameters_saved, sum_by_part
from hf_disparse.pruning.patterns import decide_n_of_m, expand_blocks, misfits, pool_blocks, pruned_in_groups


def decide_by(config: PruningConfig, task_scores, sparsity: float, active=None, cut=None) -> decision.Masks:
    """The masks that `config.decision` makes of the scores; arguments as in `decision.decide`."""
    rule = {
        "unanimous": decision.decide,
        "joint": decision.decide,  # of one task: the scores are already those of the summed losses
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
    """The masks of the weights once `round(sparsity * parts)` parts of each kind are gone.

    More may go where a whole layer is pruned after heads or neurons of other layers were, for nothing that is pruned comes back.

    A part's score for a task is the sum of those of its weights; `config.decision` decides over parts as over weights. The
    best part of every site stays, by the same rule: an encoder needs a head in each layer.

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
    """As `decide_parts`, of scores of parts: (task, kind -> site -> (parts,))."""
    masks = dict(active)
    layers_first = sorted(sites, key=lambda kind: kind != "layer")  # whose heads and neurons are gone, and count
    for kind in layers_first:
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
    """Which parts of one kind stay. Shapes: per site (parts,) scores and bools -> (parts,) bools.

    What is not `live` counts as pruned; a site where nothing is has no part that stays.

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
    """The best parts of `best_parts`, and what `config.decision` keeps of the others. Shapes and arguments as in `decide_by`."""
    others = [(task, {name: by_site[name][~best[name]] for name in best}) for task, by_site in task_scores]
    chosen = decide_by(config, others, sparsity, {name: live[name][~best[name]] for name in best}, cut)
    return {name: keep.masked_scatter(~keep, chosen[name]) for name, keep in best.items()}


def best_parts(
    config: PruningConfig, task_scores: list[tuple[str, dict[str, Tensor]]], live: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The best part of every site where one is live. Shapes as in `keep_parts`."""
    best = {name: alive.clone() for name, alive in live.items()}
    for name, alive in live.items():
        if alive.any():
            scores = [(task, {name: by_site[name]}) for task, by_site in task_scores]
            best |= decide_by(config, scores, 1 - 1 / len(alive), active={name: alive})
    return best


def decide_pattern(config: PruningConfig, task_scores, sparsity: float, active: decision.Masks) -> decision.Masks:
    """The masks in the pattern of `config`; what `active` prunes stays pruned. Arguments as in `decision.decide`.

    A block's score is the sum of those of its weights; `config.decision` decides over blocks as over weights.
    """
    if config.n_of_m:
        return decide_n_of_m(task_scores, *config.n_of_m, config.decision, config.quorum, active)
    by_block = ((task, pool_blocks(scores, *config.block)) for task, scores in task_scores)
    live = {name: kept > 0 for name, kept in pool_blocks(active, *config.block).items()}
    keep = expand_blocks(decide_by(config, by_block, sparsity, live), *config.block)
    return {name: mask & keep[name] for name, mask in active.items()}


def check_pattern(config: PruningConfig, parameters: Mapping[str, Tensor], masks: decision.Masks) -> None:
    """Refuses matrices that do not divide into the pattern, and masks that leave less than it keeps."""
    if not (config.n_of_m or config.block):
        return
    rows, columns = config.block or (1, config.n_of_m[1])
    for name in misfits(parameters, rows, columns):
        shape = " x ".join(str(n) for n in parameters[name].shape)
        raise UserError(
            f"pruning.granularity: expected matrices of a multiple of {rows} x {columns} for {config.granularity[0]}, got "
            f"{shape} for '{name}'; leave it out by exclude_modules"
        )
    for name in [name for name in masks if config.n_of_m and name in parameters]:
        n, m = config.n_of_m
        if (masks[name].reshape(-1, m).sum(dim=1) < n).any():
            raise UserError(
                f"pruning.granularity: expected {n} weights left of every {m} for {config.granularity[0]}, got fewer in "
                f"'{name}', which is sparse already; start from a dense model"
            )


def parts_to_prune(kind: str, parts: Sequence[int], sparsity: float) -> int:
    """How many parts of a kind a sparsity prunes, of so many at each site; refuses one that leaves a site without."""
    size = sum(parts)
    count, most = round(sparsity * size), size - len(parts)
    if count > most:
        raise UserError(
            f"pruning.sparsity: expected at most {most / size:.3f}, for one {kind} of each of {len(parts)} sites stays, "
            f"got {sparsity}"
        )
    return count


def count_pruned_parts(masks: decision.Masks, sites: Sites, config: PruningConfig) -> dict[str, tuple[int, int]]:
    """kind -> how many are pruned, of how many; of weights if there are no sites; as the pattern of `config` counts."""
    if config.n_of_m:
        return {"weight": pruned_in_groups(masks, *config.n_of_m)}
    if config.block:
        kept = torch.cat([blocks.flatten() for blocks in pool_blocks(masks, *config.block).values()])
        return {"block": (int((kept == 0).sum()), len(kept))}
    if not sites:
        return {"weight": count_pruned(masks)}
    if "rank" in sites:
        return {"parameter": parameters_saved(masks, sites["rank"])}
    counts = {}
    for kind, places in sites.items():
        gone = torch.cat([sum_by_part(masks, site) == 0 for site in places.values()])
        counts[kind] = (int(gone.sum()), len(gone))
    return counts
