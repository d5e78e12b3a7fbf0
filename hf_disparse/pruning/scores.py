"""How one task judges every weight: pure criteria, and one collector that streams task by task.

Words: w is a weight, g = dL_t/dw the gradient of task t's loss on one batch, sums run over the scoring batches. Every
criterion needs no more than one accumulated statistic of the gradients, so a task costs one buffer of the weights' size.
Layer 3; knows torch only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

Batch = Mapping[str, object]
LossFunction = Callable[[nn.Module, Batch], Tensor]
Average = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # tensors -> their means over processes, in place


def magnitude(weight: Tensor) -> Tensor:
    """|w|: the same for every task, so the decision rules all agree. Shape of the weight."""
    return weight.abs()


def snip(weight: Tensor, grad_abs: Tensor) -> Tensor:
    """|w| * sum |g| = sum |w g|, the connection sensitivity. Source: Lee et al. 2019 (arXiv 1810.02340), eq. 4 unnormalised.

    Shapes: weight and grad_abs (the sum of |g|) alike -> the same.
    """
    return weight.abs() * grad_abs


def disparse(weight: Tensor, grad_abs: Tensor) -> Tensor:
    """w^2 * sum |g|. Source: DiSparse, Sun et al. 2022 (arXiv 2206.04662), their code's score for pretrained models.

    Shapes: weight and grad_abs (the sum of |g|) alike -> the same.
    """
    return weight.square() * grad_abs


def fisher(weight: Tensor, grad_squared: Tensor) -> Tensor:
    """w^2 * sum g^2 / 2: rise of the loss to second order, the curvature being the diagonal empirical Fisher.

    Source: Theis et al. 2018 (arXiv 1801.05787), eq. 6, with the gradients of batches in place of single examples.
    Shapes: weight and grad_squared (the sum of g^2) alike -> the same.
    """
    return weight.square() * grad_squared / 2


def gradient(weight: Tensor, grad_sum: Tensor) -> Tensor:
    """|sum g|, by which weights grow that are zero now. Source: RigL, Evci et al. 2020 (arXiv 1911.11134), section 3 (4).

    Not a criterion for pruning: it does not look at the weight. Shapes: weight and grad_sum (the sum of g) alike -> the same.
    """
    return grad_sum.abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1): the control that knows nothing. Shape of the weight."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


# criterion -> (function of the weight and the statistic, what one batch's gradient adds to the statistic)
GRADIENT_CRITERIA = {
    "snip": (snip, torch.abs),
    "disparse": (disparse, torch.abs),
    "fisher": (fisher, torch.square),
    "gradient": (gradient, torch.positive),
}


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`model(**batch).loss`, the loss of a transformers model, the batch moved to the model's device."""
    device = next(model.parameters()).device
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}).loss


def score(
    model: nn.Module,
    loaders: Mapping[str, Iterable[Batch]],
    criterion: str = "disparse",
    *,
    parameters: Mapping[str, nn.Parameter],
    num_batches: int | None = None,
    joint: bool = False,
    task_weights: Mapping[str, float] | None = None,
    loss_fn: LossFunction = model_loss,
    average: Average | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields (task, scores) one task at a time, on the weights as they are, in eval mode, leaving `.grad` alone.

    Args:
        loaders: task -> batches of that task.
        criterion: `magnitude`, `random`, `snip`, `disparse` or `fisher`; or `gradient`, by which weights grow.
        parameters: the weights to score, by name, as `prunable_parameters(model, config)` gives them.
        num_batches: batches per task, a short loader being iterated again; by default one pass over it.
        joint: sum the tasks' losses, each times its weight, before scoring, and yield one pair named "joint".
        task_weights: task -> weight in that sum; 1 by default.
        loss_fn: (model, batch) -> scalar loss.
        average: of several processes, each with its part of every batch: a batch's gradients become their means over the
            processes before they are scored, so that all have the scores of the whole batch.
        seed: of the random criterion.
        progress: show a bar over the batches.

    Returns:
        Scores are float32 (float64 for float64 weights) with the shapes of the weights.

    Raises:
        ValueError: an unknown criterion, a loader without a batch, a loss that is NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    if criterion not in ("magnitude", "random", *GRADIENT_CRITERIA):
        known = ", ".join(GRADIENT_CRITERIA)
        raise ValueError(f"criterion: expected one of magnitude, random, {known}, got {criterion!r}")
    for group, steps in _steps(
        model, loaders, parameters, num_batches, joint, task_weights, loss_fn, average, progress
    ):
        if criterion == "magnitude":
            yield group, {name: magnitude(_wide(p.detach())) for name, p in parameters.items()}
        elif criterion == "random":
            yield group, {name: random(p.detach(), generator) for name, p in parameters.items()}
        else:
            function, reduce = GRADIENT_CRITERIA[criterion]
            total = accumulate(steps, reduce, parameters)
            yield group, {name: function(_wide(p.detach()), total.pop(name)) for name, p in parameters.items()}


def gradients(
    model: nn.Module,
    loaders: Mapping[str, Iterable[Batch]],
    *,
    parameters: Mapping[str, nn.Parameter],
    num_batches: int | None = None,
    joint: bool = False,
    task_weights: Mapping[str, float] | None = None,
    loss_fn: LossFunction = model_loss,
    average: Average | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, Iterator[dict[str, Tensor]]]]:
    """Yields (task, its gradients batch by batch), to be consumed before the next task; arguments and errors as of `score`.

    Shapes: {parameter name: as the weight}, float32 (float64 for float64 weights); zeros where a weight has no part in the loss.
    """
    for group, steps in _steps(
        model, loaders, parameters, num_batches, joint, task_weights, loss_fn, average, progress
    ):
        yield group, (accumulate([step], torch.positive, parameters) for step in steps)


def _steps(
    model, loaders, parameters, num_batches, joint, task_weights, loss_fn, average, progress
) -> Iterator[tuple[str, Iterator[tuple]]]:
    """Yields (task, its steps), or one pair "joint"; a step has the gradients of one batch of each task that is in it."""
    scale = dict.fromkeys(loaders, 1.0) | dict(task_weights or {} if joint else {})
    for group, members in ({"joint": list(loaders)} if joint else {task: [task] for task in loaders}).items():
        streams = [
            _gradients(model, t, loaders[t], parameters, num_batches, loss_fn, scale[t], average) for t in members
        ]
        yield group, _in_step(streams, group, num_batches, progress)


def _in_step(streams: list[Iterator], group: str, num_batches: int | None, progress: bool) -> Iterator[tuple]:
    """A batch of every stream at a time."""
    steps = zip_longest(*streams)
    for step in tqdm(steps, desc=f"scoring {group}", total=num_batches, disable=not progress, leave=False):
        if any(gradients is None for gradients in step):
            raise ValueError(f"{group}: expected loaders of as many batches, got one that ends first; pass num_batches")
        yield step


def accumulate(
    steps: Iterable[tuple[list[Tensor | None], ...]], reduce: Callable[[Tensor], Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Sums `reduce(g)` over the steps, where g is the sum of a step's gradients: one task's, or all tasks' when joint.

    Shapes: per step, one list of gradients (None: no part in the loss) per task, in the order of `like` -> as `like`. The lists
    are emptied on the way.
    """
    total = {name: torch.zeros_like(tensor, dtype=_wide_dtype(tensor)) for name, tensor in like.items()}
    for step in steps:
        for name, *gradients in zip(like, *step, strict=True):
            used = [g for g in gradients if g is not None]
            if used:
                total[name] += reduce(sum(used[1:], start=used[0]).to(total[name].dtype))
        for gradients in step:  # zip holds on to them while the next batch makes its own
            gradients.clear()
    return total


def _gradients(model, task, loader, parameters, num_batches, loss_fn, scale, average) -> Iterator[list[Tensor | None]]:
    """Yields, batch by batch, the gradients of `scale` times the task's loss with respect to `parameters`."""
    seen, sharded = 0, any(isinstance(p, DTensor) for p in parameters.values())
    for batch in islice(again_and_again(loader) if num_batches else loader, num_batches):
        seen += 1
        with evaluating(model, parameters), torch.enable_grad():
            loss = loss_fn(model, batch)
            if loss is None:
                raise ValueError(f"{task}: expected batches with labels, got one that has no loss")
            loss = loss * scale
            if sharded:
                gradients = _by_backward(model, loss, parameters)
            else:
                gradients = list(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
        loss = loss.detach()
        if sharded and average is not None:
            average([loss])
        elif average is not None:  # the loss, too, for a process that stopped alone would leave the others waiting
            for i, p in enumerate(parameters.values()):  # one by one, so that there is one copy of them at a time
                g = gradients[i]
                gradients[i] = (
                    torch.zeros_like(p, dtype=_wide_dtype(p)) if g is None else g.to(_wide_dtype(g), copy=True)
                )
            average([loss, *gradients])
        if not torch.isfinite(loss):
            raise ValueError(f"task '{task}': expected a finite loss while scoring, got {loss.item()} in batch {seen}")
        yield gradients
        del gradients, loss
    if not seen:
        raise ValueError(f"task '{task}': expected at least one batch to score on, got none")
    if num_batches is not None and seen < num_batches:
        raise ValueError(
            f"task '{task}': expected {num_batches} batches to score on, got {seen}; give it a loader that can be iterated again"
        )


def _by_backward(model: nn.Module, loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> list[Tensor | None]:
    """The gradients of weights that FSDP2 has in parts, in parts and averaged over the processes by its backward pass.

    Between two steps of training, where no gradients are that would be lost.
    """
    loss.backward()
    gradients = [p.grad for p in parameters.values()]
    for p in model.parameters():  # only now are they all in parts again, and other objects than while they were whole
        p.grad = None
    return gradients


def again_and_again(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader, from the start again when it ends; an iterator that has ended stays so."""
    ended = False
    while not ended:
        ended = True
        for batch in loader:
            ended = False
            yield batch


@contextmanager
def evaluating(model: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None) -> Iterator[None]:
    """Eval mode, for dropout would score a random part of the encoder, and gradients of frozen weights too."""
    training = [module for module in model.modules() if module.training]
    frozen = [p for p in (parameters or {}).values() if not p.requires_grad]
    model.eval()
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for p in frozen:
            p.requires_grad_(False)


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    """Half precision is accumulated and scored in float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))
