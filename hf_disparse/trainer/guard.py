"""Guards the promise that pruning costs no task more than so many points: a step that breaks it is undone and ends pruning.

The model is evaluated before pruning begins, right before every further update, and once training has ended. Undoing a step
takes a copy of the weights and the optimizer's state in main memory, and in every checkpoint from the first pruning on, which
is twice as large.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_disparse.config import UserError, closest
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.sparsity import masked_share
from hf_disparse.pruning.masks import MASKS_NAME, load_masks, save_masks

GUARD_NAME = "guard"  # a folder in a checkpoint
_STATE_NAME, _TENSORS_NAME = "guard.json", "guard.safetensors"
_LOG = logging.getLogger(__name__)

Points = dict[str, float]  # task -> mean of its metrics, 0 to 100


def new_guard(trainer) -> "Guard | None":
    """Returns the guard for a DisparseTrainer whose `pruning_config` sets max_drop, None for others.

    Raises:
        UserError: there are no tasks or no data to measure the promise on.
    """
    config, rows = trainer.pruning_config, trainer.eval_dataset
    if config is None or config.max_drop is None or not config.sparsity:
        return None
    if not trainer.is_multitask:
        raise UserError("pruning.max_drop: needs a MultitaskModel, whose metrics are known")
    if not rows:
        raise UserError("pruning.max_drop: needs an eval_dataset to measure the tasks on")
    most = dict(config.max_drop) if isinstance(config.max_drop, dict) else dict.fromkeys(rows, config.max_drop)
    for task in most:
        if task not in rows:
            raise UserError(f"pruning.max_drop: there is no task {task!r} in the evaluation data{closest(task, rows)}")
    return Guard(most, lambda: measure(trainer, list(most)), lambda masks: _sparsity(trainer, masks), trainer.log)


def _sparsity(trainer, masks: Mapping[str, Tensor] | None) -> float:
    """Sparsity of the prunable weights under `masks`; unpruned factors are larger than their dense matrix."""
    parameters = prunable_parameters(trainer.model, trainer.pruning_config)
    return masked_share(
        trainer.model, masks or {name: p.new_ones(p.shape, dtype=bool) for name, p in parameters.items()}
    )


def measure(trainer, tasks: Sequence[str]) -> Points:
    """Returns the tasks' points on the trainer's `eval_dataset`, without logging or disturbing training."""
    training = trainer.model.training
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        _, values = trainer.evaluate_tasks({task: trainer.eval_dataset[task] for task in tasks}, None, "guard")
    trainer.model.train(training)
    for task, metrics in values.items():
        if not metrics:
            raise UserError(f"pruning.max_drop: compute_metrics returned no metrics for task '{task}'")
    return {task: 100 * sum(metrics.values()) / len(metrics) for task, metrics in values.items()}


def worst_drop(before: Points, now: Points, most: Points) -> tuple[str, float] | None:
    """Returns the task furthest beyond its allowed drop, and the points it lost; None if every promise is kept.

    A metric that is NaN now breaks the promise.
    """
    broken = {task: before[task] - now[task] for task, points in most.items() if not before[task] - now[task] <= points}
    return max(broken.items(), key=lambda item: np.nan_to_num(item[1] - most[item[0]], nan=np.inf), default=None)


@dataclass
class Snapshot:
    """Everything that a pruning step and the training after it change, as it was right before that step.

    Args:
        step: the optimizer step that was about to begin.
        points: the tasks' points at that time.
        masks: None if nothing was pruned yet.
        optimizer, scheduler: their state dicts.
    """

    step: int
    points: Points
    weights: dict[str, Tensor]
    masks: dict[str, Tensor] | None
    skipped_layers: list[int]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]

    @classmethod
    def take(cls, step: int, points: Points, model: nn.Module, masks, optimizer, scheduler) -> "Snapshot":
        """Copies the state to main memory."""
        return cls(
            step=step,
            points=points,
            weights={name: _copied(tensor) for name, tensor in model.state_dict().items()},
            masks=None if masks is None else {name: _copied(keep) for name, keep in masks.items()},
            skipped_layers=list(model.config.skipped_layers),
            optimizer=_map(optimizer.state_dict(), _copied),
            scheduler=copy.deepcopy(scheduler.state_dict()),
        )

    def restore(self, model: nn.Module, optimizer, scheduler) -> None:
        """Restores everything but the masks, bit for bit; the snapshot can be restored again."""
        model.load_state_dict(self.weights)
        model.skip_layers(self.skipped_layers)
        optimizer.load_state_dict(_map(self.optimizer, _copied))  # copied, because the optimizer keeps what it is given
        scheduler.load_state_dict(copy.deepcopy(self.scheduler))

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the tensors and returns the rest, as JSON types."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.weights.items()}
        rest = {"step": self.step, "points": self.points, "skipped_layers": self.skipped_layers}
        for key in ("optimizer", "scheduler"):
            rest[key] = _packed(getattr(self, key), key, tensors)
        save_file(tensors, folder / _TENSORS_NAME)
        if self.masks is not None:
            save_masks(self.masks, folder / MASKS_NAME)
        return rest

    @classmethod
    def load(cls, folder: Path, rest: dict[str, Any]) -> "Snapshot":
        """Reads what `save` wrote and returned."""
        tensors = load_file(folder / _TENSORS_NAME)
        weights = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
        masks = load_masks(folder / MASKS_NAME) if (folder / MASKS_NAME).is_file() else None
        states = {key: _unpacked(rest[key], tensors) for key in ("optimizer", "scheduler")}
        return cls(**{**rest, **states, "weights": weights, "masks": masks})


class Guard:
    """Measures the tasks, remembers the state before the last pruning step, and restores it if the promise is broken.

    Args:
        most: task -> the points it may lose.
        measure: () -> the tasks' points of the current model.
        sparsity: (masks) -> sparsity of the prunable weights; masks are None before the first pruning.
        log: writes to the training log.

    Attributes:
        before: the tasks' points before pruning began, None until then.
        after: the points of the final model.
        stopped: what ended pruning early, None if it was not: `task`, its `drop` in points, the optimizer `step` that was
            undone, and the `undone` and `kept` sparsity of the prunable weights.
    """

    def __init__(
        self,
        most: Points,
        measure: Callable[[], Points],
        sparsity: Callable[[Mapping[str, Tensor] | None], float],
        log: Callable[[dict[str, float]], None],
    ):
        self.most, self._measure, self._sparsity, self._log = most, measure, sparsity, log
        self.forget()

    def forget(self) -> None:
        """Starts over, for another training."""
        self.before: Points | None = None
        self.after: Points | None = None
        self.stopped: dict[str, Any] | None = None
        self._snapshot: Snapshot | None = None

    def allows(self, step: int, model: nn.Module, masks, optimizer, scheduler) -> bool:
        """Before a pruning step: returns whether the last one kept the promise; if so, takes a snapshot for the next."""
        points = self._measure()
        if self.before is None:
            for task, value in points.items():
                if not np.isfinite(value):
                    raise UserError(f"pruning.max_drop: task '{task}' has a metric of {value} before pruning")
            self.before = points
        elif worst := worst_drop(self.before, points, self.most):
            self._stop(*worst, masks)
            return False
        self._snapshot = None  # freed first, so that there is one copy at a time
        self._snapshot = Snapshot.take(step, points, model, masks, optimizer, scheduler)
        return True

    def allows_end(self, masks) -> bool:
        """After training: returns whether the model keeps the promise."""
        if self._snapshot is None:
            return True
        self.after = self._measure()
        if worst := worst_drop(self.before, self.after, self.most):
            self._stop(*worst, masks)
            self.after = self._snapshot.points
        return worst is None

    def undo(self, model: nn.Module, optimizer, scheduler) -> dict[str, Tensor] | None:
        """Restores the state before the last pruning step and returns its masks."""
        self._snapshot.restore(model, optimizer, scheduler)
        return self._snapshot.masks

    def report(self) -> dict[str, Any]:
        """What `results.json` says of the guard."""
        return {"max_drop": self.most, "before": self.before, "after": self.after, "stopped": self.stopped}

    def _stop(self, task: str, drop: float, masks) -> None:
        """Logs what is undone and why; records it once, because training after pruning may break the promise again."""
        undone, kept, step = self._sparsity(masks), self._sparsity(self._snapshot.masks), self._snapshot.step
        if self.stopped is None:
            self.stopped = {"task": task, "drop": drop, "step": step, "undone": undone, "kept": kept}
        _LOG.warning(
            "pruning.max_drop: at sparsity %.3f task '%s' is %.2f points below its value before pruning, %g are allowed; "
            "going back to the weights of step %d, at sparsity %.3f; pruning has ended",
            *(undone, task, drop, self.most[task], step, kept),
        )
        self._log({f"guard_{task}_drop": drop, "guard_undone_sparsity": undone, "guard_kept_sparsity": kept})

    def save(self, folder: Path) -> None:
        """Writes what a resume needs; before pruning has begun, that is no file at all."""
        if self._snapshot is None:
            return
        folder.mkdir(exist_ok=True)
        state = {"before": self.before, "stopped": self.stopped, "snapshot": self._snapshot.save(folder)}
        (folder / _STATE_NAME).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, if it wrote anything."""
        if (folder / _STATE_NAME).is_file():
            state = json.loads((folder / _STATE_NAME).read_text())
            self.before, self.stopped = state["before"], state["stopped"]
            self._snapshot = Snapshot.load(folder, state["snapshot"])


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Copies nested dicts, lists and tuples, with `change` applied to their tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(inner, change) for key, inner in value.items()}
    return type(value)(_map(inner, change) for inner in value) if isinstance(value, list | tuple) else value


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turns a nested state into JSON, which has no tensors, tuples or numeric keys; the tensors go to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(inner, f"{name}/{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        inner = [_packed(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": inner}
    return {"value": value}


def _unpacked(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Reverses `_packed`."""
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpacked(inner, tensors) for key, inner in value}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_unpacked(inner, tensors) for inner in value)
    return value
