"""Pruning inside any transformers Trainer: scores, decides and masks on schedule, and holds the zeros."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.masks import MaskHooks, apply_masks, find_masks
from hf_disparse.model import MultitaskModel, prunable_parameters
from hf_disparse.schedule import sparsity_at, update_steps
from hf_disparse.scores import GRADIENT_CRITERIA, Batch, LossFunction, model_loss, score
from hf_disparse.trainer.rules import (
    check_sparsity,
    decide_by,
    decide_parts,
    gone_layers,
    prunable_sites,
    pruned_fractions,
)


class PruningCallback(TrainerCallback):
    """Prunes the model of any Trainer on the schedule of `config` and keeps pruned weights at exactly zero.

    Args:
        config: what to prune, or None to hold `masks` and prune nothing.
        loaders: task -> batches to score on, iterated from the start at every update.
        masks: weights already pruned, such as `find_masks` finds in a sparse checkpoint. They stay pruned.
        loss_fn: (model, batch) -> loss.
        weights: task -> weight in the joint decision.

    Attributes:
        masks: the masks in force, None before the first pruning.
        backward_passes: how many scoring has taken.
    """

    def __init__(
        self,
        config: PruningConfig | None,
        loaders: Mapping[str, Iterable[Batch]],
        *,
        masks: Mapping[str, Tensor] | None = None,
        loss_fn: LossFunction = model_loss,
        weights: Mapping[str, float] | None = None,
    ):
        if config is not None and config.quorum > len(loaders):
            raise UserError(
                f"pruning.quorum: expected at most the number of tasks, {len(loaders)}, got {config.quorum}"
            )
        self.config, self.loaders, self.masks = config, loaders, masks
        self._loss_fn, self._weights = loss_fn, weights
        self._hooks: MaskHooks | None = None
        self.backward_passes = 0

    @property
    def last_update(self) -> int:
        """The optimizer step of the last change of masks, -1 without any."""
        steps = update_steps(self.config) if self.config else range(0)
        return steps[-1] if steps else -1

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        """Holds the masks there are; refuses a schedule that training would cut off."""
        if self.last_update >= state.max_steps:
            steps = f"the last pruning is at step {self.last_update}, training ends at step {state.max_steps}"
            raise UserError(f"pruning: {steps}; prune earlier or train longer")
        if self.config and self.config.sparsity:
            parameters = prunable_parameters(model, self.config)  # refuses what matches nothing now, not at start_step
            if "layer" in self.config.granularity and not isinstance(model, MultitaskModel):
                got = type(model).__name__
                raise UserError(f"pruning.granularity: layers are pruned from a MultitaskModel only, got {got}")
            for kind, places in prunable_sites(model, self.config).items():
                check_sparsity(kind, [site.parts for site in places.values()], self.config.sparsity)
            done = [step for step in update_steps(self.config) if step < state.global_step]
            if done and self.masks is None:  # resumed from a checkpoint without masks: a foreign Trainer's, say
                self.masks = self._masks_in_zeros(model, parameters, sparsity_at(self.config, done[-1]))
        if self.masks is not None:
            self._hold(model, self.masks)

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        """Prunes if the schedule says so, on the weights as the last step left them."""
        sparsity = sparsity_at(self.config, state.global_step) if self.config else None
        if sparsity is not None:
            self.prune(model, sparsity, progress=state.is_local_process_zero and not args.disable_tqdm)

    def on_optimizer_step(self, args, state, control, *, model, **kwargs):
        """Undoes what momentum and weight decay did to pruned weights."""
        if self.masks is not None:
            apply_masks(model, self.masks)

    def on_train_end(self, args, state, control, **kwargs):
        """Lets the gradients pass again."""
        self.release()

    def _masks_in_zeros(self, model: nn.Module, parameters: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """The masks of a model that was pruned to `sparsity`, from its zeros."""
        masks = find_masks(parameters)
        for kind, (pruned, size) in pruned_fractions(masks, prunable_sites(model, self.config)).items():
            if pruned < round(sparsity * size):
                got = f"{pruned} pruned among {size} {kind}s"
                raise UserError(
                    f"pruning: expected a checkpoint pruned to {sparsity:.3f}, got {got}; start a run of its own"
                )
        return masks

    def prune(self, model: nn.Module, sparsity: float, progress: bool = False) -> None:
        """Scores every task, decides, applies and holds the masks; does nothing to a model that is as sparse already."""
        parameters = prunable_parameters(model, self.config)
        held = self.masks or {}
        active = {name: held.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in parameters.items()}
        sites = prunable_sites(model, self.config)
        if all(pruned >= round(sparsity * size) for pruned, size in pruned_fractions(active, sites).values()):
            return
        joint = self.config.decision == "joint"
        stream = score(
            model,
            self.loaders,
            self.config.criterion,
            parameters=parameters,
            num_batches=self.config.score_batches,
            joint=joint,
            weights=self._weights,
            loss_fn=self._loss_fn,
            seed=self.config.seed,
            progress=progress,
        )
        if sites:
            decided = decide_parts(self.config, stream, sparsity, active, sites)
        else:
            decided = decide_by(self.config, stream, sparsity, active)
        self._hold(model, {**held, **decided})
        if self.config.criterion in GRADIENT_CRITERIA:
            self.backward_passes += len(self.loaders) * self.config.score_batches

    def _hold(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.release()
        parameters = dict(model.named_parameters())
        self.masks = {n: keep.to(parameters[n].device) if n in parameters else keep for n, keep in masks.items()}
        apply_masks(model, self.masks)  # refuses the masks of another model
        if self.config and "layer" in self.config.granularity:
            model.skip_layers(sorted({*model.config.skipped_layers, *gone_layers(model, self.masks)}))
        self._hooks = MaskHooks(model, self.masks)

    def release(self) -> None:
        """Lets the gradients of pruned weights pass again."""
        if self._hooks:
            self._hooks.remove()
            self._hooks = None
