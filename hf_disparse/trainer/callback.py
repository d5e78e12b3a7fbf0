"""Pruning inside any transformers Trainer: when to prune, what the method decides, and how the zeros are held."""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.distributed.fsdp import is_sharded, place, reshard
from hf_disparse.distributed.processes import require_same, share
from hf_disparse.methods import Update, new_method
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import prunable_parameters, prunable_sites, skip_gone_layers
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.granularity import granularity_of
from hf_disparse.pruning.masks import MaskHooks, apply_masks, find_masks
from hf_disparse.pruning.reconstruction import check as check_reconstruction
from hf_disparse.pruning.reconstruction import reconstruct
from hf_disparse.pruning.schedule import update_steps
from hf_disparse.pruning.scores import Batch, LossFunction, model_loss
from hf_disparse.pruning.stored_scores import SCORES_FOLDER
from hf_disparse.trainer.guard import Guard
from hf_disparse.trainer.reinitialise import reinitialise
from hf_disparse.trainer.scoring import Scorer


class PruningCallback(TrainerCallback):
    """Prunes the model of any Trainer on the schedule of `config` and keeps pruned weights at exactly zero.

    Args:
        config: what to prune, or None to hold `masks` and prune nothing.
        loaders: task -> batches to score on, iterated from the start at every update. With several processes, each
            passes its share of every batch.
        masks: weights already pruned, such as `find_masks` finds in a sparse checkpoint. They stay pruned.
        loss_fn: (model, batch) -> loss.
        task_weights: task -> weight in the joint decision.
        guard: undoes a pruning step that costs a task more than `config.max_drop`.

    Attributes:
        masks: the masks in force, None before the first pruning.
        scorer: scores the tasks when the method asks for it.
    """

    def __init__(
        self,
        config: PruningConfig | None,
        loaders: Mapping[str, Iterable[Batch]],
        *,
        masks: Mapping[str, Tensor] | None = None,
        loss_fn: LossFunction = model_loss,
        task_weights: Mapping[str, float] | None = None,
        guard: Guard | None = None,
    ):
        if config is not None and config.quorum > len(loaders):
            raise UserError(
                f"pruning.quorum: expected at most the number of tasks, {len(loaders)}, got {config.quorum}"
            )
        if config is not None and not config.in_training:
            raise UserError(
                f"pruning.method: {config.method} prunes before training; call `hf_disparse.shrink`, then pass masks=find_masks(...)"
            )
        if config is not None and config.max_drop is not None and config.sparsity and guard is None:
            raise UserError("pruning.max_drop: needs DisparseTrainer, which evaluates the tasks between pruning steps")
        self.config, self.loaders, self.masks, self.guard = config, loaders, masks, guard
        self.task = next(iter(loaders), "")  # the task of the batch in the next backward pass
        self._loss_fn, self._task_weights = loss_fn, task_weights
        self._parameters: dict[str, nn.Parameter] = {}
        self._mask_hooks: MaskHooks | None = None
        self._gradient_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._loaded_state: dict[str, Tensor] | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets an earlier training, except for its masks."""
        self.method = new_method(self.config) if self.config and self.config.sparsity else None
        self.scorer = Scorer(self.config, self.loaders, self._loss_fn, self._task_weights)
        if self.guard:
            self.guard.forget()

    def prepare(self, model: nn.Module, optimizer=None) -> None:
        """Lets the method change modules of the model; `optimizer` is None if none holds their parameters yet."""
        if self.method:
            self.method.prepare(model, optimizer)

    def on_init_end(self, args, state, control, *, model=None, optimizer=None, **kwargs):
        """Prepares the model of another Trainer before that creates its optimizer."""
        if model is not None:
            self.prepare(model, optimizer)

    @property
    def backward_passes(self) -> int:
        """Backward passes taken by scoring."""
        return self.scorer.backward_passes

    @property
    def measures(self) -> dict[str, float]:
        """How far the tasks agreed at the last update, for the next line of the log."""
        return self.scorer.measures

    @property
    def last_update(self) -> int:
        """The optimizer step of the last update of the masks in this training, -1 if there is none."""
        return self.method.steps[-1] if self.method and self.method.steps else -1

    def check(self, model: nn.Module, args: TrainingArguments, max_steps: int) -> None:
        """Refuses what would otherwise fail in the middle of a training of `max_steps` optimizer steps.

        Changes neither model nor masks; with `reconstruct` it takes one forward pass.

        Raises:
            UserError: the configuration does not suit this model, these arguments or so few steps.
        """
        if not self.method:
            return
        config, parameters = self.config, prunable_parameters(model, self.config)
        if "layer" in config.granularity and not isinstance(model, MultitaskModel):
            got = type(model).__name__
            raise UserError(f"pruning.granularity: layers are pruned from a MultitaskModel only, got {got}")
        if isinstance(model, MultitaskModel) and model.config.unshared:
            raise UserError(
                f"pruning: {', '.join(model.config.unshared)} have layers of their own; prune first, then call unshare"
            )
        granularity_of(config).check(parameters, self.masks or {})
        self.method.check(parameters, prunable_sites(model, config))
        if self.method.sees_gradients and args.fp16:
            raise UserError(
                f"pruning.method: {config.method} reads raw gradients, which fp16 training scales; use bf16 instead"
            )
        if config.keep_scores and any(Path(task).name != task for task in self.loaders):
            got = ", ".join(self.loaders)
            raise UserError(f"pruning.keep_scores: task names must be valid file names, got {got}")
        if (last := update_steps(config, max_steps)[-1]) >= max_steps:
            raise UserError(
                f"pruning: the last pruning is at step {last}, training ends at step {max_steps}; prune earlier or train longer"
            )
        if config.reconstruct:
            batches = iter(loader := next(iter(self.loaders.values())))
            for batch in islice(batches, 0 if batches is loader else 1):  # an iterator would lose its first batch
                check_reconstruction(model, parameters, batch, self.scorer.loss_fn)

    def on_train_begin(self, args, state, control, *, model, optimizer=None, **kwargs):
        """Checks that training can be pruned as configured, prepares the method and holds the masks that exist."""
        self.end()  # an earlier attempt of `auto_find_batch_size` may have died without `on_train_end`
        if self.guard and self.guard.stopped:  # resumed after the guard ended pruning: only recovery is left
            self.method = self._loaded_state = None
        if self.method:
            if optimizer is not None:  # a loop that hides its optimizer calls `prepare` itself
                self.prepare(model, optimizer)
            self.check(model, args, state.max_steps)
            self._begin(model, args, state)
        if self.masks is not None:
            self._hold(model, self.masks)
        if self.method and self.method.sees_gradients:
            self._hook_gradients(model)

    def _begin(self, model: nn.Module, args, state) -> None:
        """Starts the method, or continues it from the checkpoint that training resumes from."""
        self._parameters = prunable_parameters(model, self.config)
        self.method.begin(self._parameters, self.loaders, state.max_steps)
        if self.config.keep_scores and state.is_world_process_zero:
            self.scorer.scores_folder = Path(args.output_dir, SCORES_FOLDER)
        if self._loaded_state is not None:
            self.method.load_state(self._loaded_state)
            self._loaded_state = None
        elif self.method.keeps_state and 0 < state.global_step <= self.last_update:
            raise UserError(
                f"pruning: the checkpoint does not hold the state of method {self.config.method}; resume from a checkpoint "
                "of DisparseTrainer, or start a new run"
            )
        done = [step for step in self.method.steps if step < state.global_step]
        if done and self.guard and self.guard.before is None:
            raise UserError("pruning.max_drop: cannot be added once pruning has begun; start a new run")
        if done and self.masks is None:  # resumed from a checkpoint without masks, such as another Trainer's
            self.masks = self._masks_in_zeros(model, self._parameters, done[-1])

    def _hook_gradients(self, model: nn.Module) -> None:
        """Shows the method the gradients of training, but not those of scoring."""

        def see(name: str, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
            if model.training:
                return self.method.gradient(name, parameter.detach(), gradient, self.task)

        self._gradient_hooks = [p.register_hook(partial(see, name, p)) for name, p in self._parameters.items()]

    def on_step_begin(self, args, state, control, *, model, optimizer=None, lr_scheduler=None, **kwargs):
        """Updates the masks if it is time to, on the weights that the last step left."""
        if self.method and state.global_step in self.method.steps:
            if self.guard and not self.guard.allows(state.global_step, model, self.masks, optimizer, lr_scheduler):
                self._undo(model, optimizer, lr_scheduler)
                return
            self.prune(model, state.global_step, optimizer, state.is_world_process_zero and not args.disable_tqdm)
            if state.global_step == self.last_update:  # a checkpoint that is less sparse cannot be the best one
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if self.method:
            self.method.before_step(self._parameters, state.global_step)

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        """Hands the accumulated gradients to the method."""
        if self.method:
            self.method.before_optimizer(self._parameters)

    def on_optimizer_step(self, args, state, control, *, model, optimizer=None, **kwargs):
        """Zeroes the pruned weights again, which momentum may have moved."""
        if self.method:
            self.method.after_optimizer(self._parameters, optimizer)
        if self.masks is not None:
            apply_masks(model, self.masks)

    def on_train_end(self, args, state, control, *, model, optimizer=None, lr_scheduler=None, **kwargs):
        """Undoes the last pruning step if it cost too much; removes all hooks."""
        if self.guard and not self.guard.allows_end(self.masks):
            self._undo(model, optimizer, lr_scheduler)
        self.end()

    def _undo(self, model: nn.Module, optimizer, scheduler) -> None:
        """Goes back to before the last pruning step and ends pruning: without a method, its masks are only held."""
        self.end()
        self.method, masks = None, self.guard.undo(model, optimizer, scheduler)
        if masks is None:
            self.masks = None
        else:
            self._hold(model, masks)

    def _masks_in_zeros(self, model: nn.Module, parameters: Mapping[str, Tensor], step: int) -> Masks:
        """The masks of a model that was last pruned at `step`, read from its zeros."""
        masks, sites = find_masks(parameters), prunable_sites(model, self.config)
        sparsity = self.method.sparsity_at(step, masks, sites)
        for kind, (pruned, size) in granularity_of(self.config).count(masks, sites).items():
            if pruned < round(sparsity * size):
                raise UserError(
                    f"pruning: the checkpoint should be pruned to {sparsity:.3f}, but only {pruned} of {size} {kind}s are "
                    "pruned; start a new run"
                )
        return masks

    def prune(self, model: nn.Module, step: int, optimizer=None, progress: bool = False) -> None:
        """Asks the method for masks, then applies and holds them."""
        reshard(model)
        parameters, held = prunable_parameters(model, self.config), self.masks or {}
        masks = {name: held.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in parameters.items()}
        now = Update(
            step=step,
            parameters=parameters,
            masks=masks,
            sites=prunable_sites(model, self.config),
            score=partial(self.scorer.score, model, parameters, masks, progress),
            optimizer=optimizer,
            gradients=partial(self.scorer.gradients, model, parameters, progress),
        )
        before = {name: p.detach().clone() for name, p in parameters.items()} if self.config.reconstruct else {}
        if is_sharded(parameters):
            self.release()  # with FSDP, scoring is an ordinary backward pass and needs the gradients of pruned weights
            decided = self.scorer.decide_sharded(self.method, now)
            if decided is None and self.masks is not None:
                self._hold(model, self.masks)
        else:
            decided = self.method.update(now)
            require_same(masks if decided is None else decided, step)
        if decided is not None:
            self._hold(model, {**held, **decided})
            if self.config.reconstruct:
                self._reconstruct(model, before, progress)
        if self.config.reinitialise and step == self.last_update:
            reinitialise(model.base_model, self.config.seed, optimizer)
            apply_masks(model, self.masks or {})

    def _reconstruct(self, model: nn.Module, before: Mapping[str, Tensor], progress: bool) -> None:
        """Fits the remaining weights to the outputs of the weights `before` pruning, on scoring batches of all tasks."""
        scorer, masks = self.scorer, {name: self.masks[name] for name in before}
        batches = scorer.reconstruction_batches()
        reconstruct(model, masks, before, batches, loss_fn=scorer.loss_fn, average=scorer.average, progress=progress)
        share(model.base_model.parameters())  # different machines round differently

    def state(self) -> dict[str, Tensor]:
        """The method's state, for a checkpoint."""
        return self.method.state() if self.method else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Sets the state of a checkpoint, which the method takes when training begins."""
        self._loaded_state = state

    def _hold(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.release()
        parameters = dict(model.named_parameters())
        self.masks = {n: place(keep, parameters[n]) if n in parameters else keep for n, keep in masks.items()}
        apply_masks(model, self.masks)  # raises if the masks belong to another model
        skip_gone_layers(model, self.config, self.masks)
        self._mask_hooks = MaskHooks(model, self.masks)

    def release(self) -> None:
        """Lets the gradients of pruned weights through again."""
        if self._mask_hooks:
            self._mask_hooks.remove()
            self._mask_hooks = None

    def end(self) -> None:
        """Removes all hooks from the model."""
        if self.method:
            self.method.end()
        self.release()
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = []
