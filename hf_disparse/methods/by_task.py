"""Methods that keep buffers for every task, fed by the gradients of its own training batches."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_disparse.distributed.processes import mean_over_processes, processes
from hf_disparse.methods.base import Method
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.rules import decide_by


class ByTask(Method):
    """Keeps one float32 buffer of each of its `kinds` per task and prunable weight, until the last update.

    The backward pass of a task's batch goes to the buffers of that task; with `decision: joint` there is one task of that
    name, which sees all of them. A task without a batch so far has no vote, and a quorum counts only tasks that have one. With
    several processes, which all work on the same task, the buffers see the mean gradient of every backward pass.
    """

    sees_gradients = True
    keeps_state = True
    kinds: tuple[str, ...] = ()
    first = 0.0  # the value of a buffer before the first batch

    def begin(self, parameters: Mapping[str, nn.Parameter], tasks: Iterable[str], max_steps: int) -> None:
        super().begin(parameters, tasks, max_steps)
        self._parameters = parameters
        self._tasks = ("joint",) if self.config.decision == "joint" else tuple(tasks)
        self.buffers: dict[str, dict[str, dict[str, Tensor]]] = {}  # task -> kind -> parameter name -> tensor
        self.over = False

    def before_step(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Frees the memory once the last update is done."""
        if step >= self.last:
            self.over = True
            self.release()

    def release(self) -> None:
        """Drops what only further updates would need."""
        self.buffers = {}

    def gradient(self, name: str, weight: Tensor, gradient: Tensor, task: str) -> None:
        if self.over:
            return
        if processes() > 1:  # DDP averages only once the whole pass is done
            gradient = mean_over_processes(
                [gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)]
            )[0]
        task = "joint" if self.config.decision == "joint" else task
        if task not in self.buffers:
            self.buffers[task] = {kind: self._new() for kind in self.kinds}
        self.see(task, name, weight, gradient, *(by_name[name] for by_name in self.buffers[task].values()))

    def _new(self) -> dict[str, Tensor]:
        return {
            name: torch.full_like(p, self.first, dtype=torch.float32, requires_grad=False)
            for name, p in self._parameters.items()
        }

    def ordered_buffers(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Returns the buffers in the order of the tasks, whichever task had the first batch."""
        return {task: self.buffers[task] for task in self._tasks if task in self.buffers}

    def see(self, task: str, name: str, weight: Tensor, gradient: Tensor, *buffers: Tensor) -> None:
        """Updates the buffers of one weight tensor, in place."""
        raise NotImplementedError

    def decide(self, scores: Mapping[str, Mapping[str, Tensor]], sparsity: float, live: Masks) -> Masks:
        """Returns the masks by `config.decision` over the tasks with buffers; what is not `live` stays pruned and counts."""
        size, left = (sum(count(mask) for mask in live.values()) for count in (Tensor.numel, Tensor.sum))
        if size - round(sparsity * size) >= left:
            return dict(live)
        config = self.config
        if config.decision == "quorum":
            config = replace(config, quorum=min(config.quorum, len(scores)))
        return decide_by(config, scores, sparsity, active=live)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{kind}/{task}/{name}": tensor
            for task, kinds in self.buffers.items()
            for kind, by_name in kinds.items()
            for name, tensor in by_name.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for task in self._tasks:
            if all(f"{self.kinds[0]}/{task}/{name}" in state for name in self._parameters):
                self.buffers[task] = {kind: self.loaded(state, f"{kind}/{task}/") for kind in self.kinds}

    def loaded(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Returns the tensors of the prunable weights below a prefix, each on the device of its weight."""
        return {
            name: state[prefix + name].to(p.device) for name, p in self._parameters.items() if prefix + name in state
        }
