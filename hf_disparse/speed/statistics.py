"""What `pruning.curvature` needs to know of a model: inputs and output gradients of its matrices, gathered task by task."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_disparse.config import UserError
from hf_disparse.pruning.scores import Batch, LossFunction, evaluating

_Calls = list[tuple[Tensor, Tensor]]  # input and output of a module; DeBERTa also projects its relative positions


@dataclass
class Statistics:
    """Means over real tokens, in float32.

    Args:
        gram: module -> H (in, in), over the tokens of all tasks; modules that share their inputs share the tensor.
            DeBERTa's relative positions are tokens, too, to the modules that project them.
        curvature: module that reads parts -> G_t of each task, (tasks, out, out).
        diagonal: module -> the diagonals of G_t of each task, (tasks, out).
    """

    gram: dict[str, Tensor] = field(default_factory=dict)
    curvature: dict[str, Tensor] = field(default_factory=dict)
    diagonal: dict[str, Tensor] = field(default_factory=dict)

    def joint(self) -> "Statistics":
        """Returns those of the summed losses, as of a single task: the control without disentangling."""
        curvature, diagonal = (
            {name: value.sum(0, keepdim=True) for name, value in of_tasks.items()}
            for of_tasks in (self.curvature, self.diagonal)
        )
        return Statistics(self.gram, curvature, diagonal)

    def in_units(self, weights: Mapping[str, Tensor]) -> "Statistics":
        """Divides each task's curvature by what it would lose if every column of the readers went alone.

        So the scale of a task's loss, and how well it has learned its examples, do not count.
        """
        units = sum(
            ((g @ weights[f"{name}.weight"]) * weights[f"{name}.weight"]).sum(1) @ self.gram[name].diagonal() / 2
            for name, g in self.curvature.items()
        )  # (tasks,)
        units = units.clamp_min(1e-30)
        curvature = {name: value / units[:, None, None] for name, value in self.curvature.items()}
        return Statistics(self.gram, curvature, {name: value / units[:, None] for name, value in self.diagonal.items()})


def of_magnitude(weights: Mapping[str, Tensor], readers: Iterable[str]) -> Statistics:
    """Returns statistics by which a weight costs w^2 / 2, as inputs and gradients of unit variance have: a control."""
    modules = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    return Statistics(
        {name: torch.eye(weight.shape[1]) for name, weight in modules.items()},
        {name: torch.eye(len(modules[name]))[None] for name in readers},
        {name: torch.ones(1, len(weight)) for name, weight in modules.items()},
    )


def gather(
    model: nn.Module,
    modules: Iterable[str],
    readers: Iterable[str],
    batches: Mapping[str, Iterable[Batch]],
    loss_fn: LossFunction,
    progress: bool = False,
) -> Statistics:
    """Takes one forward and one backward pass for each batch.

    Args:
        modules: names of the Linear modules of the encoder's layers.
        readers: those of them that read parts.
        batches: task -> its batches.
        loss_fn: (model, batch) -> loss, the mean over the batch's examples.

    Raises:
        UserError: a task without batches, or a loss that is not finite.
    """
    names, readers = list(modules), set(readers)
    found, given_rows, shared = Statistics(), dict.fromkeys(names, 0), {}
    means: dict[str, list[Tensor]] = {name: [] for name in names}  # of each task
    for task, of_task in batches.items():
        curvature: dict[str, Tensor] = {}
        mine = 0
        for batch in tqdm(of_task, desc=f"judging by {task}", disable=not progress, leave=False):
            calls, gradients = _pass(model, names, batch, loss_fn, task)
            real = _real(batch, calls[names[0]][0][0])
            mine += int(real.sum())
            shared = shared or _share(names, calls)
            for name in names:
                if shared[name] == name:
                    rows = _rows([given.detach() for given, _ in calls[name]], real)
                    found.gram[name] = found.gram.get(name, 0) + rows.T @ rows
                    given_rows[name] += len(rows)
                slope = len(real) * _rows(gradients[name], real)  # of one example's loss, as the batch's is their mean
                wanted = slope.T @ slope if name in readers else slope.square().sum(0)
                curvature[name] = curvature.get(name, 0) + wanted
        if not mine:
            raise UserError(f"task '{task}': expected at least one batch to judge by, got none")
        for name, total in curvature.items():
            means[name].append(total / mine)
    for name in names:
        of_tasks = torch.stack(means[name])
        if name in readers:
            found.curvature[name] = of_tasks
            of_tasks = of_tasks.diagonal(dim1=1, dim2=2)
        found.diagonal[name] = of_tasks
        found.gram[name] = found.gram[name] / given_rows[name] if shared[name] == name else found.gram[shared[name]]
    return found


def _pass(
    model: nn.Module, names: list[str], batch: Batch, loss_fn: LossFunction, task: str
) -> tuple[dict[str, _Calls], dict[str, list[Tensor]]]:
    """Returns what each module was given and gave for one batch, and the gradients of the loss with respect to what it gave."""
    calls: dict[str, _Calls] = {name: [] for name in names}
    passes = []
    modules = {name: model.get_submodule(name) for name in names}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: calls[name].append((args[0], output)))
        for name, module in modules.items()
    ]
    handles.append(model.base_model.register_forward_hook(lambda *_: passes.append(1)))
    with evaluating(model, {name: module.weight for name, module in modules.items()}), torch.enable_grad():
        try:
            loss = loss_fn(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        if loss is None or not torch.isfinite(loss):
            got = "none; do the batches have labels?" if loss is None else f"{loss.item()}"
            raise UserError(f"task '{task}': expected a finite loss, got {got}")
        if len(passes) > 1:
            raise UserError(f"task '{task}': expected a loss of one pass of the encoder, got one of {len(passes)}")
        slopes = iter(torch.autograd.grad(loss, [output for name in names for _, output in calls[name]]))
    return calls, {name: [next(slopes) for _ in calls[name]] for name in names}


def _rows(tensors: Iterable[Tensor], real: Tensor) -> Tensor:
    """The rows of real tokens, and all rows of what does not belong to tokens. Shapes: (..., size) -> (rows, size) float32."""
    return torch.cat([t[real] if t.shape[:-1] == real.shape else t.flatten(0, -2) for t in tensors]).float()


def _real(batch: Batch, like: Tensor) -> Tensor:
    """(examples, tokens) bool, False for padding."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != like.shape[:2]:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    return mask.to(like.device).bool()


def _share(names: Iterable[str], calls: Mapping[str, _Calls]) -> dict[str, str]:
    """module -> the first one that is given the same tensors."""
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(tuple(id(given) for given, _ in calls[name]), name) for name in names}
