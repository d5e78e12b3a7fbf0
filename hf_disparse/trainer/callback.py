"""Pruning inside any transformers Trainer: asks the method for masks on its schedule, and holds the zeros."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.masks import MaskHooks, apply_masks, find_masks
from hf_disparse.model import MultitaskModel, prunable_parameters
from hf_disparse.schedule import sparsity_at, update_steps
from hf_disparse.scores import GRADIENT_CRITERIA, Batch, LossFunction, model_loss, score
from hf_disparse.trainer.methods import Update, new_method
from hf_disparse.trainer.methods.base import Stream
from hf_disparse.trainer.rules import check_sparsity, gone_layers, prunable_sites, pruned_fractions


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
        self.method = new_method(config) if config and config.sparsity else None
        self.task = next(iter(loaders), "")  # whose batch the next backward pass is of
        self._loss_fn, self._weights = loss_fn, weights
        self._parameters: dict[str, nn.Parameter] = {}
        self._hooks: MaskHooks | None = None
        self._watches: list[torch.utils.hooks.RemovableHandle] = []
        self._loaded_state: dict[str, Tensor] | None = None
        self.backward_passes = 0

    @property
    def last_update(self) -> int:
        """The optimizer step of the last change of masks, -1 without any; of a relative schedule once training began."""
        steps = list(self.method.steps) or update_steps(self.config) if self.method else ()
        return steps[-1] if steps else -1

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        """Holds the masks there are; refuses a schedule that training would cut off."""
        if self.method:
            self._parameters = parameters = self._check(model, args)
            self.method.begin(parameters, self.loaders, state.max_steps)
            if self._loaded_state is not None:
                self.method.load_state(self._loaded_state)
                self._loaded_state = None
        if self.last_update >= state.max_steps:
            steps = f"the last pruning is at step {self.last_update}, training ends at step {state.max_steps}"
            raise UserError(f"pruning: {steps}; prune earlier or train longer")
        if self.method:
            done = [step for step in self.method.steps if step < state.global_step]
            if done and self.masks is None:  # resumed from a checkpoint without masks: a foreign Trainer's, say
                self.masks = self._masks_in_zeros(model, parameters, sparsity_at(self.config, done[-1]))
        if self.masks is not None:
            self._hold(model, self.masks)
        if self.method and self.method.sees_gradients:
            self._watch(model, parameters)

    def _check(self, model: nn.Module, args) -> dict[str, nn.Parameter]:
        """Refuses now what would fail at the first update; returns the prunable weights."""
        config, parameters = self.config, prunable_parameters(model, self.config)
        if "layer" in config.granularity and not isinstance(model, MultitaskModel):
            got = type(model).__name__
            raise UserError(f"pruning.granularity: layers are pruned from a MultitaskModel only, got {got}")
        for kind, places in prunable_sites(model, config).items():
            check_sparsity(kind, [site.parts for site in places.values()], config.sparsity)
        if self.method.sees_gradients and args.fp16:
            raise UserError(
                f"pruning.method: {config.method} reads gradients as they come, which fp16 scales; use bf16"
            )
        return parameters

    def _watch(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Shows the method the gradients of training, not those of scoring."""

        def see(name: str, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
            if model.training:
                return self.method.gradient(name, parameter.detach(), gradient, self.task)

        self._watches = [p.register_hook(partial(see, name, p)) for name, p in parameters.items()]

    def on_step_begin(self, args, state, control, *, model, optimizer=None, **kwargs):
        """Changes the masks if it is time, on the weights as the last step left them."""
        if self.method and state.global_step in self.method.steps:
            self.prune(model, state.global_step, optimizer, state.is_local_process_zero and not args.disable_tqdm)
        if self.method:
            self.method.before_step(self._parameters, state.global_step)

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        """Hands the complete gradients to the method."""
        if self.method:
            self.method.before_optimizer(self._parameters)

    def on_optimizer_step(self, args, state, control, *, model, optimizer=None, **kwargs):
        """Undoes what momentum and weight decay did to pruned weights."""
        if self.method:
            self.method.after_optimizer(self._parameters, optimizer)
        if self.masks is not None:
            apply_masks(model, self.masks)

    def on_train_end(self, args, state, control, **kwargs):
        """Lets the gradients pass again."""
        self.end()

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

    def prune(self, model: nn.Module, step: int, optimizer=None, progress: bool = False) -> None:
        """Asks the method for masks, applies and holds them."""
        parameters, held = prunable_parameters(model, self.config), self.masks or {}
        masks = {name: held.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in parameters.items()}
        decided = self.method.update(
            Update(
                step=step,
                model=model,
                parameters=parameters,
                masks=masks,
                sites=prunable_sites(model, self.config),
                tasks=tuple(self.loaders),
                score=partial(self._score, model, parameters, progress),
                optimizer=optimizer,
            )
        )
        if decided is not None:
            self._hold(model, {**held, **decided})

    def _score(self, model, parameters, progress: bool, criterion: str, joint: bool = False) -> Stream:
        if criterion in GRADIENT_CRITERIA:
            self.backward_passes += len(self.loaders) * self.config.score_batches
        return score(
            model,
            self.loaders,
            criterion,
            parameters=parameters,
            num_batches=self.config.score_batches,
            joint=joint,
            weights=self._weights,
            loss_fn=self._loss_fn,
            seed=self.config.seed,
            progress=progress,
        )

    def state(self) -> dict[str, Tensor]:
        """The method's, for a checkpoint."""
        return self.method.state() if self.method else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes a checkpoint's, when training begins."""
        self._loaded_state = state

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

    def end(self) -> None:
        """Lets go of the model."""
        self.release()
        for watch in self._watches:
            watch.remove()
        self._watches = []
