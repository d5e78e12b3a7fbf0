"""Tasks that leave or join after pruning: decides again from stored scores, and lets the stored tasks vote on a new one.

Both read what a run with `pruning.keep_scores: true` left in its folder, see `hf_disparse.pruning.stored_scores`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.methods.base import Update
from hf_disparse.methods.saliency import Saliency
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import prunable_parameters, prunable_sites, skip_gone_layers
from hf_disparse.model.unshared import shared_name
from hf_disparse.pruning.decision import Masks, decide, ranks
from hf_disparse.pruning.granularity import granularity_of
from hf_disparse.pruning.masks import apply_masks, find_masks
from hf_disparse.pruning.schedule import update_steps
from hf_disparse.pruning.scores import GRADIENT_CRITERIA, Batch, model_loss, score
from hf_disparse.pruning.stored_scores import load_scores, scored_tasks


def decide_again(
    model: MultitaskModel, folder: str | Path, without: Sequence[str] = (), *, config: PruningConfig | None = None
) -> Masks:
    """Returns the masks that the stored scores of a run give without the votes of some tasks; needs no data and no gradients.

    Weights that are zero in `model` stay zero, so there are two uses. A **dense** model (the run's `dense` folder) gives the masks
    of the other tasks at any sparsity. A **sparse** model can only lose more weights, at a higher sparsity; at its own it stays as it
    is, no matter how the remaining tasks would have chosen. With all tasks, on the weights that were scored, the masks are those of
    the run, bit for bit. The scores are those of the last update, and weights that the run had pruned before it stay pruned.

    Args:
        model: has weights with the names and sizes of the run's; is not changed.
        folder: the run's folder, with `scores/`.
        without: tasks whose scores are ignored.
        config: another sparsity, decision or granularity; by default the one in `folder`.

    Returns:
        The masks, on the CPU; `prune_again` applies them, `DisparseTrainer(model, masks=...)` holds them.

    Raises:
        UserError: the folder has no scores for this model or these tasks, or the sparsity is below the model's.
    """
    config = config or PruningConfig.from_pretrained(folder)
    if config.method != PruningConfig.method or config.decision == "joint" or not config.sparsity:
        got = f"method {config.method}, decision {config.decision}, sparsity {config.sparsity}"
        raise UserError(f"config: expected tasks that judge weights by scores and a sparsity above 0, got {got}")
    files = _files(folder, without)
    if config.quorum > len(files):
        raise UserError(
            f"pruning.quorum: expected at most the number of tasks that are left, {len(files)}, got {config.quorum}; pass "
            "another config"
        )
    parameters, sites = prunable_parameters(model, config), prunable_sites(model, config)
    live = {name: keep.cpu() for name, keep in find_masks(parameters).items()}
    for name, keep in load_scores(next(iter(files.values())), parameters)[1].items():
        live[name] &= keep
    for kind, (pruned, size) in granularity_of(config).count(live, sites).items():
        if pruned > round(config.sparsity * size) and not sites:
            got = f"{config.sparsity} of {size}, of which {pruned} {kind}s are zero or were pruned before they were scored"
            raise UserError(
                f"pruning.sparsity: expected at least that of the model, got {got}; start from the dense model"
            )
    stream = ((task, load_scores(path, parameters)[0]) for task, path in files.items())
    now = Update(
        step=update_steps(config)[-1],
        parameters=parameters,
        masks=live,
        sites=sites,
        score=lambda criterion, joint=False: stream,
        optimizer=None,
    )
    masks = Saliency(config).update(now)
    return live if masks is None else masks


def prune_again(
    model: MultitaskModel, folder: str | Path, without: Sequence[str] = (), *, config: PruningConfig | None = None
) -> Masks:
    """Applies `decide_again` in place: removes the heads of the tasks `without`, and prunes what the others can spare.

    Returns:
        The masks, on the device of the weights; pass them to further training, `DisparseTrainer(model, masks=...)`.
    """
    if not set(model.heads) - set(without):
        raise UserError(f"without: expected a task to be left of {', '.join(model.heads)}, got {list(without)}")
    config = config or PruningConfig.from_pretrained(folder)
    masks = decide_again(model, folder, without, config=config)
    parameters = dict(model.named_parameters())
    masks = {name: keep.to(parameters[name].device) for name, keep in masks.items()}
    for task in without:
        if task in model.heads:
            model.remove_task(task)
    apply_masks(model, masks)
    skip_gone_layers(model, config, masks)
    return masks


def vote_masks(
    model: MultitaskModel,
    task: str,
    batches: Iterable[Batch],
    folder: str | Path,
    nearest: int = 3,
    *,
    config: PruningConfig | None = None,
) -> tuple[Masks, dict[str, float]]:
    """Returns what a new task may keep of its own layers, by the vote of the stored tasks that are most similar to it.

    The similarity of two tasks is the rank correlation of their scores over the non-zero weights. The `nearest` tasks vote with the
    masks that each would have alone at the sparsity of `config`, and the majority decides. Zeros of the model stay zero. Only the
    new task's own layers are affected, so call `unshare` first, or start the task alone with `MultitaskModel.from_encoder`.
    Source: Meta-Vote Pruning, Zhao et al. 2023 (arXiv 2301.11560), without its meta-training.

    The new task's scores are noise while its head is untrained: first train the head with the encoder frozen. Only the order of the
    correlations matters: as |w| is part of every score, they tend to be above 0 for any two tasks.

    Args:
        batches: batches of the new task with labels; one pass over them.
        folder: the folder of a run that stored scores by gradients.
        nearest: number of tasks that vote.
        config: by default the one in `folder`.

    Returns:
        The masks of all prunable weights, for `DisparseTrainer(model, masks=...)`, and {stored task: correlation}, largest first.
    """
    config = config or PruningConfig.from_pretrained(folder)
    _check_vote(model, task, config)
    files = _files(folder, [])
    if type(nearest) is not int or not 1 <= nearest <= len(files):
        raise UserError(f"nearest: expected 1 to {len(files)}, as many as there are stored tasks, got {nearest!r}")
    own = _parameters_of(model, task, config)  # the stored name -> (the name in the model, the weight)
    weights = {name: weight for name, (_, weight) in own.items()}
    [(_, mine)] = score(
        model,
        {task: batches},
        config.criterion,
        parameters=weights,
        loss_fn=lambda model, batch: model_loss(model, {**batch, "task": task}),
    )
    similarity = _similarity(mine, files, weights)
    voters = list(similarity)[:nearest]
    votes = majority((decide({t: load_scores(files[t], weights)[0]}, config.sparsity) for t in voters), nearest)
    masks = {name: keep.cpu() for name, keep in find_masks(prunable_parameters(model, config)).items()}
    for name, (place, _) in own.items():
        if place != name or len(model.heads) == 1:
            masks[place] &= votes[name]
    return masks, similarity


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's 1 - 6 sum d^2 / (n (n^2 - 1)), d the difference of a weight's two ranks, ties ranked by position.

    Shapes: (n,) and (n,), n > 1 -> between -1 and 1; 0 is what chance gives.
    """
    n = len(first)
    difference = (ranks(first, None) - ranks(second, None)).double()  # int32 before: ranks are below 2^31
    return 1 - 6 * float(difference.square().sum()) / (n * (n * n - 1.0))


def majority(masks: Iterable[Masks], voters: int) -> Masks:
    """Keeps what more than half of the voters' masks keep. Shapes: {name: bool, weight-shaped} each -> the same."""
    votes: dict[str, Tensor] = {}
    for mask in masks:
        for name, keep in mask.items():
            votes[name] = votes[name] + keep if name in votes else keep.to(torch.int16)
    return {name: 2 * count > voters for name, count in votes.items()}


def _check_vote(model: MultitaskModel, task: str, config: PruningConfig) -> None:
    """Raises UserError if tasks cannot be compared by these scores, or `task` shares all its layers."""
    if config.criterion not in GRADIENT_CRITERIA:
        raise UserError(
            f"pruning.criterion: expected scores by gradients, which tell tasks apart, got {config.criterion}"
        )
    if config.granularity != ("weight",):
        got = ", ".join(config.granularity)
        raise UserError(f"pruning.granularity: expected weight, as a task's own mask is of single weights, got {got}")
    if task not in model.heads or (len(model.heads) > 1 and task not in model.config.unshared):
        raise UserError(
            f"task: expected one with layers of its own, got {task!r}; see unshare, or start it alone by from_encoder"
        )


def _files(folder: str | Path, without: Sequence[str]) -> dict[str, Path]:
    files = scored_tasks(folder)
    if isinstance(without, str) or not set(without) < set(files):
        got = repr(without)
        raise UserError(
            f"without: expected a list of some of the stored tasks, {', '.join(files)}, but not all, got {got}"
        )
    return {task: path for task, path in files.items() if task not in without}


def _parameters_of(model: MultitaskModel, task: str, config: PruningConfig) -> dict[str, tuple[str, Tensor]]:
    """The prunable weights that the task runs on: the name that they have where all is shared -> (name here, weight)."""
    prefix, own = "encoder.", {}
    for name, weight in prunable_parameters(model, config).items():
        inner = name.removeprefix(prefix)
        shared = prefix + shared_name(model.encoder, inner)
        if shared == name:
            own.setdefault(name, (name, weight))
        elif inner.split(".")[1] == task:
            own[shared] = (name, weight)
    return own


def _similarity(
    mine: Mapping[str, Tensor], files: Mapping[str, Path], weights: Mapping[str, Tensor]
) -> dict[str, float]:
    """The rank correlation of `mine` with each stored task's scores over the non-zero weights, largest first."""
    live = {name: weight.detach().cpu() != 0 for name, weight in weights.items()}
    flat = _flat(mine, live)
    similarity = {t: rank_correlation(flat, _flat(load_scores(path, weights)[0], live)) for t, path in files.items()}
    return dict(sorted(similarity.items(), key=lambda entry: -entry[1]))


def _flat(scores: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([scores[name].cpu()[keep] for name, keep in live.items()])
