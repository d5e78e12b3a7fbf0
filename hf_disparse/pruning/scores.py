"""How each task scores every weight: the criteria as pure functions, and the backward passes that feed them.

Notation: w is a weight, g = dL_t/dw the gradient of task t's loss on one batch, sums run over the scoring batches. Every
criterion needs at most one accumulated statistic of the gradients, so a task costs one buffer of the weights' size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

Batch = Mapping[str, object]
LossFunction = Callable[[nn.Module, Batch], Tensor]
Average = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # tensors -> their means over processes, in place
Gradients = list[
    Tensor | None
]  # of one task's loss on one batch, in the order of the parameters; None: not used by the loss
Step = tuple[Gradients, ...]  # one batch of one task, or of each task when joint
Stream = Iterator[tuple[str, dict[str, Tensor]]]  # (task, its scores), one task at a time


def magnitude(weight: Tensor) -> Tensor:
    """|w|, the same for every task, so that all decision rules agree. Shape of the weight."""
    return weight.abs()


def snip(weight: Tensor, grad_abs: Tensor) -> Tensor:
    """|w| * sum |g| = sum |w g|, the connection sensitivity. Source: Lee et al. 2019 (arXiv 1810.02340), eq. 4 unnormalised.

    Shapes: weight, grad_abs (the sum of |g|) and the result alike.
    """
    return weight.abs() * grad_abs


def disparse(weight: Tensor, grad_abs: Tensor) -> Tensor:
    """w^2 * sum |g|. Source: DiSparse, Sun et al. 2022 (arXiv 2206.04662), their code's score for pretrained models.

    Shapes: weight, grad_abs (the sum of |g|) and the result alike.
    """
    return weight.square() * grad_abs


def fisher(weight: Tensor, grad_squared: Tensor) -> Tensor:
    """w^2 * sum g^2 / 2, the second-order increase of the loss, with the diagonal empirical Fisher as curvature.

    Source: Theis et al. 2018 (arXiv 1801.05787), eq. 6, with gradients of batches instead of single examples.
    Shapes: weight, grad_squared (the sum of g^2) and the result alike.
    """
    return weight.square() * grad_squared / 2


def gradient(weight: Tensor, grad_sum: Tensor) -> Tensor:
    """|sum g|, which decides which zero weights grow. Source: RigL, Evci et al. 2020 (arXiv 1911.11134), section 3 (4).

    Not a pruning criterion, because it ignores the weight. Shapes: weight, grad_sum (the sum of g) and the result alike.
    """
    return grad_sum.abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), the uninformed control. Shape of the weight."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


# criterion -> (function of the weight and the statistic, what one batch's gradient adds to the statistic)
GRADIENT_CRITERIA = {
    "snip": (snip, torch.abs),
    "disparse": (disparse, torch.abs),
    "fisher": (fisher, torch.square),
    "gradient": (gradient, torch.positive),
}


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`model(**batch).loss` of a transformers model, after moving the batch to the model's device."""
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
) -> Stream:
    """Yields (task, scores) one task at a time, on the current weights, in eval mode, leaving `.grad` alone.

    Args:
        loaders: task -> batches of that task.
        criterion: `magnitude`, `random`, `snip`, `disparse` or `fisher`; or `gradient`, by which weights grow.
        parameters: the weights to score, by name, as `prunable_parameters(model, config)` returns them.
        num_batches: batches per task; a short loader is iterated again. By default one pass over the loader.
        joint: sum the tasks' losses, each times its weight, before scoring, and yield one pair named "joint".
        task_weights: task -> weight in that sum; 1 by default.
        loss_fn: (model, batch) -> scalar loss.
        average: averages the gradients over processes before scoring, so that every process scores the whole batch.
        seed: of the random criterion.
        progress: show a bar over the batches.

    Returns:
        Scores with the shapes of the weights, float32 (float64 for float64 weights).

    Raises:
        ValueError: an unknown criterion, a loader without a batch, a loss that is NaN or infinite or uses none of the weights.
    """
    if criterion not in ("magnitude", "random", *GRADIENT_CRITERIA):
        known = ", ".join(GRADIENT_CRITERIA)
        raise ValueError(f"criterion: expected one of magnitude, random, {known}, got {criterion!r}")
    generator = torch.Generator().manual_seed(seed)
    scoring = ScoringPass(model, loaders, parameters, num_batches, task_weights, loss_fn, average, progress)
    for group, steps in scoring.steps(joint):
        if criterion == "magnitude":
            yield group, {name: magnitude(_wide(p.detach())) for name, p in parameters.items()}
        elif criterion == "random":
            yield group, {name: random(p.detach(), generator) for name, p in parameters.items()}
        else:
            function, reduce = GRADIENT_CRITERIA[criterion]
            total = _sum_over(steps, reduce, parameters)
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
    """Yields (task, its gradients batch by batch); consume them before the next task. Arguments and errors as in `score`.

    Shapes: {parameter name: as the weight}, float32 (float64 for float64 weights); zeros where the loss does not use a weight.
    """
    scoring = ScoringPass(model, loaders, parameters, num_batches, task_weights, loss_fn, average, progress)
    for group, steps in scoring.steps(joint):
        yield group, (_sum_over([step], torch.positive, parameters) for step in steps)


@dataclass(frozen=True)
class ScoringPass:
    """The backward passes of `score` and `gradients`; fields as their arguments."""

    model: nn.Module
    loaders: Mapping[str, Iterable[Batch]]
    parameters: Mapping[str, nn.Parameter]
    num_batches: int | None = None
    task_weights: Mapping[str, float] | None = None
    loss_fn: LossFunction = model_loss
    average: Average | None = None
    progress: bool = False

    def steps(self, joint: bool = False) -> Iterator[tuple[str, Iterator[Step]]]:
        """Yields (task, its steps) for every task, or one pair ("joint", steps with a batch of every task)."""
        if not joint:
            for task in self.loaders:
                yield task, self._together(task, [self._gradients(task)])
            return
        scale = dict.fromkeys(self.loaders, 1.0) | dict(self.task_weights or {})
        yield "joint", self._together("joint", [self._gradients(task, scale[task]) for task in self.loaders])

    def _together(self, group: str, streams: list[Iterator[Gradients]]) -> Iterator[Step]:
        """Advances all streams by one batch at a time."""
        steps = zip_longest(*streams)
        bar = tqdm(steps, desc=f"scoring {group}", total=self.num_batches, disable=not self.progress, leave=False)
        for step in bar:
            if any(gradients is None for gradients in step):
                raise ValueError(f"{group}: the loaders differ in their number of batches; pass num_batches")
            yield step

    def _gradients(self, task: str, scale: float = 1.0) -> Iterator[Gradients]:
        """Yields, batch by batch, the gradients of `scale` times the task's loss."""
        loader, wanted, seen = self.loaders[task], self.num_batches, 0
        for batch in islice(again_and_again(loader) if wanted else loader, wanted):
            seen += 1
            loss, gradients = self._backward(task, batch, scale)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"task '{task}': expected a finite loss while scoring, got {loss.item()} in batch {seen}"
                )
            yield gradients
            del gradients, loss
        if not seen:
            raise ValueError(f"task '{task}': expected at least one batch to score on, got none")
        if wanted is not None and seen < wanted:
            raise ValueError(
                f"task '{task}': expected {wanted} batches to score on, got {seen}; pass a loader that can be iterated again"
            )

    def _backward(self, task: str, batch: Batch, scale: float) -> tuple[Tensor, Gradients]:
        """The loss of one batch and its gradients, averaged over the processes if they share the batch."""
        parameters = list(self.parameters.values())
        sharded = any(isinstance(p, DTensor) for p in parameters)
        with evaluating(self.model, self.parameters), torch.enable_grad():
            loss = self.loss_fn(self.model, batch)
            if loss is None:
                raise ValueError(f"task '{task}': the model returns no loss for a batch; do the batches have labels?")
            loss = loss * scale
            if sharded:
                gradients = _by_backward(self.model, loss, parameters)
            else:
                gradients = list(torch.autograd.grad(loss, parameters, allow_unused=True))
                if gradients and all(g is None for g in gradients):
                    raise ValueError(
                        f"task '{task}': the loss uses none of the parameters; pass those that the model has now, "
                        "and if it is sped up, call hf_disparse.undo_speed_up(model) before"
                    )
        loss = loss.detach()
        if sharded and self.average is not None:
            self.average([loss])  # the gradients are averaged already
        elif self.average is not None:
            for i, p in enumerate(parameters):  # one by one, so that there is one copy of them at a time
                g = gradients[i]
                gradients[i] = (
                    torch.zeros_like(p, dtype=_wide_dtype(p)) if g is None else g.to(_wide_dtype(g), copy=True)
                )
            # The loss too, so that all processes stop at a NaN: one that stopped alone would leave the others waiting.
            self.average([loss, *gradients])
        return loss, gradients


def _sum_over(
    steps: Iterable[Step], reduce: Callable[[Tensor], Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The sum of `reduce(g)` over the steps, where g adds up the gradients of the tasks in a step; empties the steps' lists.

    Shapes: per step and task one list of gradients in the order of `like` -> as `like`.
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


def _by_backward(model: nn.Module, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Gradients:
    """The gradients of weights that FSDP2 has sharded, themselves sharded and averaged over processes by its backward pass.

    Clears `.grad`, so it must run between two training steps.
    """
    loss.backward()
    gradients = [p.grad for p in parameters]
    for p in model.parameters():  # looked up anew: while layers are gathered, their parameters are other objects
        p.grad = None
    return gradients


def again_and_again(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Repeats a loader's batches for ever; ends if the loader yields none, as an exhausted iterator does."""
    ended = False
    while not ended:
        ended = True
        for batch in loader:
            ended = False
            yield batch


@contextmanager
def evaluating(model: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None) -> Iterator[None]:
    """Eval mode, because dropout would score a random part of the encoder; frozen `parameters` get gradients meanwhile."""
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
    """At least float32, in which half precision is accumulated and scored."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))
