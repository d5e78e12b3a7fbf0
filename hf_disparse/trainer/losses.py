"""What a training step minimises beyond a task's own loss: distillation terms and task weights."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def distillation_loss(
    logits: Tensor, teacher: Tensor, problem_type: str, temperature: float, labels: Tensor | None = None
) -> Tensor:
    """Returns the distance of the logits from the teacher's at temperature T (Hinton et al. 2015, arXiv 1503.02531).

    T^2 KL(softmax(teacher / T) || softmax(logits / T)) for classes, T^2 times the cross entropy of each label's sigmoids
    for multi-label tasks, the mean squared difference for regression.

    Shapes: logits and teacher (batch, classes), or (batch, tokens, classes) for token classification with labels (batch,
    tokens), where tokens with label -100 are ignored. Returns a scalar, the mean over examples or tokens.
    """
    logits, teacher = logits.float(), teacher.float()
    if problem_type == "regression":
        return F.mse_loss(logits, teacher)
    logits, teacher = logits / temperature, teacher / temperature
    if problem_type == "multi_label_classification":
        return temperature**2 * F.binary_cross_entropy_with_logits(logits, teacher.sigmoid())
    if problem_type == "token_classification":
        logits, teacher = logits[labels != -100], teacher[labels != -100]
    divergence = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    return temperature**2 * divergence


def hidden_loss(hidden: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Mean squared difference of hidden states over real tokens, averaged over layers (TinyBERT, arXiv 1909.10351).

    Shapes: per layer (batch, tokens, width); attention_mask (batch, tokens), 1 for a real token. Returns a scalar.
    """
    real = attention_mask.bool()
    return torch.stack(
        [F.mse_loss(h[real].float(), t[real].float()) for h, t in zip(hidden, teacher, strict=True)]
    ).mean()


def uncertainty_weight(mean_loss: float) -> float:
    """The weight of a task under the homoscedastic uncertainty of Kendall et al. (CVPR 2018, arXiv 1705.07115).

    They also minimise exp(-s) L + s over the log-variance s; at its optimum, s = log L, the weight exp(-s) is 1 / L.
    Taking that optimum for a running mean of L, instead of learning s, leaves nothing to tune.
    """
    return 1.0 / max(mean_loss, 1e-3)  # a memorised task must not dominate the others


def pcgrad_weights(gram: Tensor, generator: torch.Generator) -> Tensor:
    """Returns weights c such that sum_k c_k g_k is the step of PCGrad (Yu et al., NeurIPS 2020, arXiv 2001.06782).

    PCGrad removes from each task's gradient, going through the others in random order, what conflicts with theirs:
    g_i <- g_i - (g_i . g_j / |g_j|^2) g_j where g_i . g_j < 0, and sums the results. These are all combinations of the
    original gradients, so their inner products are all it takes.

    Shapes: gram (tasks, tasks), entry (i, j) is g_i . g_j -> (tasks,).
    """
    combination = torch.eye(len(gram), dtype=gram.dtype)
    for i in range(len(gram)):
        for j in torch.randperm(len(gram), generator=generator).tolist():
            inner = combination[i] @ gram[j]
            if j != i and inner < 0:  # which implies that neither gradient is zero
                combination[i, j] -= inner / gram[j, j]
    return combination.sum(0)


class GradientSurgery:
    """PCGrad over the batches of one optimizer step: `take` after each backward pass, `give` before the step."""

    def __init__(self):
        self._taken: dict[str, dict[nn.Parameter, Tensor]] = {}

    def take(self, task: str, parameters: Iterable[nn.Parameter]) -> None:
        """Moves the gradients of the shared parameters to the task's, adding to those taken before."""
        mine = self._taken.setdefault(task, {})
        for parameter in parameters:
            if parameter.grad is not None:
                mine[parameter] = parameter.grad + mine[parameter] if parameter in mine else parameter.grad
                parameter.grad = None

    def give(self, generator: torch.Generator) -> None:
        """Combines the taken gradients into the parameters' and forgets them."""
        tasks, self._taken = list(self._taken.values()), {}
        parameters = list(dict.fromkeys(p for task in tasks for p in task))
        gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
        for i, one in enumerate(tasks):
            for j, other in enumerate(tasks[: i + 1]):
                both = [p for p in parameters if p in one and p in other]
                gram[i, j] = gram[j, i] = sum(float((one[p].double() * other[p].double()).sum()) for p in both)
        weights = pcgrad_weights(gram, generator).tolist()
        for p in parameters:
            p.grad = sum(weight * task[p] for weight, task in zip(weights, tasks, strict=True) if p in task)
