"""Movement pruning: what moves away from zero stays: `method: movement`.

w is a weight's latent value, M in {0, 1} its mask, g the gradient of one task's loss with respect to the effective weight
w M, S the weight's score for that task. Source: Sanh et al. 2020 (arXiv 2005.07683).
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hf_disparse.methods.base import Update
from hf_disparse.methods.by_task import ByTask
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.masks import count_pruned
from hf_disparse.pruning.schedule import sparsity_at


def hard_step(score: Tensor, weight: Tensor, gradient: Tensor, held: Tensor | None = None) -> None:
    """S <- S - w g, in place: a straight-through gradient step on S. Section 4, without its constant rate.

    Shapes: all alike; `weight` is the effective weight, +0.0 where pruned, and `held` the latent value there, 0 elsewhere.
    """
    score.addcmul_(weight, gradient, value=-1)
    if held is not None:
        score.addcmul_(held, gradient, value=-1)


def soft_step(score: Tensor, movement: Tensor, rate: float, penalty: float) -> None:
    """S <- S - rate (movement + penalty sigmoid'(S)), in place: descent on the loss plus penalty * sum sigmoid(S).

    Shapes: score and movement (w g, in a unit of the caller's) alike. Soft movement pruning, section 4.
    """
    falls = torch.sigmoid(score)
    falls.addcmul_(falls, falls, value=-1)  # sigmoid' = sigmoid - sigmoid^2
    score.sub_(falls.mul_(penalty).add_(movement), alpha=rate)


def above_threshold(
    task_scores: Mapping[str, Mapping[str, Tensor]], threshold: float, quorum: int = 1
) -> dict[str, Tensor]:
    """Returns masks that keep {w : sigmoid(S_t(w)) > threshold for at least `quorum` tasks}; the paper has one task.

    Args:
        task_scores: task -> parameter name -> scores, weight-shaped.
        threshold: in (0, 1).
    """
    limit = math.log(threshold / (1 - threshold))
    first = next(iter(task_scores.values()))
    votes = {name: sum((scores[name] > limit).to(torch.int16) for scores in task_scores.values()) for name in first}
    return {name: count >= quorum for name, count in votes.items()}


_SOFT_START = 1.0  # S before the first batch: above any threshold below 0.73


class Movement(ByTask):
    """Prunes what moves towards zero on every task's own batches; a weight that comes back has the value it had before.

    Until the last update, `held` has the latent values of pruned weights and 0 elsewhere. Neither gradients nor weight decay
    change them, but their scores go on. Weights pruned before training have no value to come back with and stay pruned.
    """

    kinds = ("score",)

    def begin(self, parameters: Mapping[str, nn.Parameter], tasks: Iterable[str], max_steps: int) -> None:
        super().begin(parameters, tasks, max_steps)
        self.soft = self.config.mode == "soft"
        self.first = _SOFT_START if self.soft else 0.0
        self.held: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}  # task -> sum of (w g)^2 and how many, (2,) float64

    def see(self, task: str, name: str, weight: Tensor, gradient: Tensor, *buffers: Tensor) -> None:
        if not self.soft:
            hard_step(*buffers, weight, gradient, self.held.get(name))
            return
        moved = torch.mul(weight + self.held[name] if name in self.held else weight, gradient).float()
        squares = self._squares.setdefault(task, torch.zeros(2, dtype=torch.float64, device=moved.device))
        squares += torch.stack([moved.square().sum(), moved.new_tensor(moved.numel())])
        unit = (squares[0] / squares[1]).sqrt().clamp_min(1e-30).float()
        soft_step(*buffers, moved.div_(unit), self.config.score_learning_rate, self.config.penalty)

    def update(self, now: Update) -> Masks:
        scores = {task: kinds["score"] for task, kinds in self.ordered_buffers().items()}
        live = {name: mask | (self.held[name] != 0) if self.held else mask for name, mask in now.masks.items()}
        masks = self._soft_masks(scores, live) if self.soft and now.step < self.last else None
        if masks is None:
            sparsity = self.config.sparsity if self.soft else sparsity_at(self.config, now.step, self.max_steps)
            masks = self.decide(scores, sparsity, live)
        with torch.no_grad():
            for name, p in now.parameters.items():
                # One of the two is 0, so the sum is exact.
                latent = p + self.held[name] if name in self.held else p.clone()
                p.copy_(latent.where(masks[name], 0.0))
                self.held[name] = latent.masked_fill_(masks[name], 0.0)
        return masks

    def _soft_masks(self, scores: Mapping[str, Mapping[str, Tensor]], live: Masks) -> Masks | None:
        """Returns what the threshold keeps, or None if that is less than the final sparsity leaves."""
        quorum = min(self.config.quorum, len(scores))
        masks = {
            name: mask & live[name] for name, mask in above_threshold(scores, self.config.threshold, quorum).items()
        }
        pruned, size = count_pruned(masks)
        return masks if pruned <= round(self.config.sparsity * size) else None

    def release(self) -> None:
        super().release()
        self.held, self._squares = {}, {}

    def state(self) -> dict[str, Tensor]:
        held = {f"held/{name}": tensor for name, tensor in self.held.items()}
        return super().state() | held | {f"squares/{task}": tensor for task, tensor in self._squares.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.held = self.loaded(state, "held/")
        device = next(iter(self._parameters.values())).device
        self._squares = {
            task: state[f"squares/{task}"].to(device) for task in self.buffers if f"squares/{task}" in state
        }


METHOD = Movement
