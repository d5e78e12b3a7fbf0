"""Pruning inside any transformers Trainer: asks the method for masks on its schedule, and holds the zeros."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_disparse.analysis import Watch
from hf_disparse.config import TASK_CRITERIA, PruningConfig, UserError
from hf_disparse.distributed.fsdp import decide_on_main, is_sharded, place, reshard
from hf_disparse.distributed.processes import average, processes, require_same, share
from hf_disparse.methods import Update, new_method
from hf_disparse.methods.base import Stream
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import gone_layers, prunable_parameters, prunable_sites
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.masks import MaskHooks, apply_masks, find_masks
from hf_disparse.pruning.reconstruction import check, reconstruct
from hf_disparse.pruning.rules import check_pattern, count_pruned_parts
from hf_disparse.pruning.scores import (
    GRADIENT_CRITERIA,
    Average,
    Batch,
    LossFunction,
    again_and_again,
    gradients,
    model_loss,
    score,
)
from hf_disparse.pruning.stored_scores import SCORES_FOLDER, keep_scores
from hf_disparse.trainer.guard import Guard
from hf_disparse.trainer.reinitialise import reinitialise

_FIT_BATCHES = 8  # of a task at most, to reconstruct on: docs/glue.md shows that 4 are nearly as good


class PruningCallback(TrainerCallback):
    """Prunes the model of any Trainer on the schedule of `config` and keeps pruned weights at exactly zero.

    Args:
        config: what to prune, or None to hold `masks` and prune nothing.
        loaders: task -> batches to score on, iterated from the start at every update; of several processes each has its
            part of every batch.
        masks: weights already pruned, such as `find_masks` finds in a sparse checkpoint. They stay pruned.
        loss_fn: (model, batch) -> loss.
        task_weights: task -> weight in the joint decision.
        guard: what undoes a pruning step that costs a task too much, as `config.max_drop` asks for it.

    Attributes:
        masks: the masks in force, None before the first pruning.
        backward_passes: how many scoring has taken.
        measures: how much the tasks agreed at the last update, for the next line of the log.
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
        if config is not None and config.max_drop is not None and config.sparsity and guard is None:
            raise UserError(
                "pruning.max_drop: expected a DisparseTrainer, which measures the tasks, got another Trainer"
            )
        self.config, self.loaders, self.masks, self.guard = config, loaders, masks, guard
        self.task = next(iter(loaders), "")  # whose batch the next backward pass is of
        self._loss_fn, self._task_weights = loss_fn, task_weights
        self._parameters: dict[str, nn.Parameter] = {}
        self._mask_hooks: MaskHooks | None = None
        self._gradient_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._loaded_state: dict[str, Tensor] | None = None
        self._scores_folder: Path | None = None  # where scores are kept, if they are
        self.restart()

    def restart(self) -> None:
        """Forgets an earlier training, but for the masks."""
        self.method = new_method(self.config) if self.config and self.config.sparsity else None
        self.backward_passes = 0
        self.measures: dict[str, float] = {}
        if self.guard:
            self.guard.forget()

    def prepare(self, model: nn.Module, optimizer=None) -> None:
        """Lets the method change modules of the model; `optimizer` is one that holds their parameters already."""
        if self.method:
            self.method.prepare(model, optimizer)

    def on_init_end(self, args, state, control, *, model=None, optimizer=None, **kwargs):
        """Makes the model of a foreign Trainer ready, before that makes its optimizer."""
        if model is not None:
            self.prepare(model, optimizer)

    @property
    def last_update(self) -> int:
        """The optimizer step of the last change of masks in the training that began, -1 without any."""
        return self.method.steps[-1] if self.method and self.method.steps else -1

    def on_train_begin(self, args, state, control, *, model, optimizer=None, **kwargs):
        """Holds the masks there are; refuses a schedule that training would cut off."""
        self.end()  # a try before this one, as of `auto_find_batch_size`, may have ended without a word
        if self.guard and self.guard.stopped:  # resumed: pruning has ended, and what is left is recovery
            self.method = self._loaded_state = None
        if self.method:
            if optimizer is not None:  # else this is a rehearsal
                self.prepare(model, optimizer)
            self._parameters = parameters = self._check(model, args)
            self.method.begin(parameters, self.loaders, state.max_steps)
            if self.config.reconstruct and state.global_step <= self.last_update:
                batches = iter(loader := next(iter(self.loaders.values())))
                for batch in islice(batches, 0 if batches is loader else 1):  # an iterator would lose it
                    check(model, parameters, batch, self._loss_fn)
            if self.config.keep_scores and any(Path(task).name != task for task in self.loaders):
                got = ", ".join(self.loaders)
                raise UserError(f"pruning.keep_scores: expected tasks whose names can name a file, got {got}")
            if self.config.keep_scores and state.is_world_process_zero:
                self._scores_folder = Path(args.output_dir, SCORES_FOLDER)
            if self._loaded_state is not None:
                self.method.load_state(self._loaded_state)
                self._loaded_state = None
            elif self.method.keeps_state and 0 < state.global_step <= self.last_update:
                raise UserError(
                    f"pruning: expected a checkpoint with the state of method {self.config.method}, got one without it; "
                    "resume a DisparseTrainer's, or start a run of its own"
                )
        if self.last_update >= state.max_steps:
            steps = f"the last pruning is at step {self.last_update}, training ends at step {state.max_steps}"
            raise UserError(f"pruning: {steps}; prune earlier or train longer")
        if self.method:
            done = [step for step in self.method.steps if step < state.global_step]
            if done and self.guard and self.guard.before is None:
                got = "a checkpoint of a run without it"
                raise UserError(
                    f"pruning.max_drop: expected to begin before pruning does, got {got}; start a run of its own"
                )
            if done and self.masks is None:  # resumed from a checkpoint without masks: a foreign Trainer's, say
                self.masks = self._masks_in_zeros(model, parameters, done[-1])
        if self.masks is not None:
            self._hold(model, self.masks)
        if self.method and self.method.sees_gradients:
            self._hook_gradients(model, parameters)

    def _check(self, model: nn.Module, args) -> dict[str, nn.Parameter]:
        """Refuses now what would fail at the first update; returns the prunable weights."""
        config, parameters = self.config, prunable_parameters(model, self.config)
        if "layer" in config.granularity and not isinstance(model, MultitaskModel):
            got = type(model).__name__
            raise UserError(f"pruning.granularity: layers are pruned from a MultitaskModel only, got {got}")
        if isinstance(model, MultitaskModel) and model.config.unshared:
            got = f"one where {', '.join(model.config.unshared)} have layers of their own"
            raise UserError(
                f"pruning: expected a model whose tasks share all layers, got {got}; prune before unsharing"
            )
        check_pattern(config, parameters, self.masks or {})
        self.method.check(parameters, prunable_sites(model, config))
        if self.method.sees_gradients and args.fp16:
            raise UserError(
                f"pruning.method: {config.method} reads gradients as they come, which fp16 scales; use bf16"
            )
        return parameters

    def _hook_gradients(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Shows the method the gradients of training, not those of scoring."""

        def see(name: str, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
            if model.training:
                return self.method.gradient(name, parameter.detach(), gradient, self.task)

        self._gradient_hooks = [p.register_hook(partial(see, name, p)) for name, p in parameters.items()]

    def on_step_begin(self, args, state, control, *, model, optimizer=None, lr_scheduler=None, **kwargs):
        """Changes the masks if it is time, on the weights as the last step left them."""
        if self.method and state.global_step in self.method.steps:
            if self.guard and not self.guard.allows(state.global_step, model, self.masks, optimizer, lr_scheduler):
                self._undo(model, optimizer, lr_scheduler)
                return
            self.prune(model, state.global_step, optimizer, state.is_world_process_zero and not args.disable_tqdm)
            if state.global_step == self.last_update:  # a checkpoint that is less sparse is not the best one
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if self.method:
            self.method.before_step(self._parameters, state.global_step)

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        """Hands the complete gradients to the method."""
        if self.method:
            self.method.before_optimizer(self._parameters)

    def on_optimizer_step(self, args, state, control, *, model, optimizer=None, **kwargs):
        """Undoes what momentum did to pruned weights."""
        if self.method:
            self.method.after_optimizer(self._parameters, optimizer)
        if self.masks is not None:
            apply_masks(model, self.masks)

    def on_train_end(self, args, state, control, *, model, optimizer=None, lr_scheduler=None, **kwargs):
        """Undoes the last pruning step if it cost too much; lets the gradients pass again."""
        if self.guard and not self.guard.allows_end(self.masks):
            self._undo(model, optimizer, lr_scheduler)
        self.end()

    def _undo(self, model: nn.Module, optimizer, scheduler) -> None:
        """Goes back to before the last pruning step and ends pruning: the method is out, its masks are held."""
        self.end()
        self.method, masks = None, self.guard.undo(model, optimizer, scheduler)
        if masks is None:
            self.masks = None
        else:
            self._hold(model, masks)

    def _masks_in_zeros(self, model: nn.Module, parameters: Mapping[str, Tensor], step: int) -> Masks:
        """The masks of a model that was last pruned at `step`, from its zeros."""
        masks, sites = find_masks(parameters), prunable_sites(model, self.config)
        sparsity = self.method.sparsity_at(step, masks, sites)
        for kind, (pruned, size) in count_pruned_parts(masks, sites, self.config).items():
            if pruned < round(sparsity * size):
                got = f"{pruned} pruned among {size} {kind}s"
                raise UserError(
                    f"pruning: expected a checkpoint pruned to {sparsity:.3f}, got {got}; start a run of its own"
                )
        return masks

    def prune(self, model: nn.Module, step: int, optimizer=None, progress: bool = False) -> None:
        """Asks the method for masks, applies and holds them."""
        reshard(model)
        parameters, held = prunable_parameters(model, self.config), self.masks or {}
        masks = {name: held.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in parameters.items()}
        now = Update(
            step=step,
            parameters=parameters,
            masks=masks,
            sites=prunable_sites(model, self.config),
            score=partial(self._score, model, parameters, progress),
            optimizer=optimizer,
            gradients=partial(self._gradients, model, parameters, progress),
        )
        before = {name: p.detach().clone() for name, p in parameters.items()} if self.config.reconstruct else {}
        if is_sharded(parameters):
            decided = self._decide_sharded(model, now)
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

    @property
    def _average(self) -> Average | None:
        """None in one process, whose gradients need no copy."""
        return average if processes() > 1 else None

    def _reconstruct(self, model: nn.Module, before: Mapping[str, Tensor], progress: bool) -> None:
        """Fits what is left to what the weights did `before`, on scoring batches of all tasks."""
        count, batches = min(self.config.score_batches, _FIT_BATCHES), []
        for task, loader in self.loaders.items():
            mine = list(islice(again_and_again(loader), count))
            if len(mine) < count:
                raise UserError(
                    f"pruning.reconstruct: expected {count} batches of task '{task}' to fit on, got {len(mine)}; give it a loader "
                    "that can be iterated again"
                )
            batches += mine
        masks = {name: self.masks[name] for name in before}
        reconstruct(model, masks, before, batches, loss_fn=self._loss_fn, average=self._average, progress=progress)
        share(model.base_model.parameters())  # unlike machines round unlike

    def _decide_sharded(self, model: nn.Module, now: Update) -> Mapping[str, Tensor] | None:
        """As the method's `update`, on the main process, which alone sees whole scores."""

        def update(masks, score):
            def seen(criterion: str, joint: bool = False) -> Stream:  # a weight is zero where its mask is
                return self._observed(score(criterion, joint), masks, (self.masks and masks) or {}, criterion, joint)

            return self.method.update(replace(now, masks=masks, score=seen))

        self.release()  # scoring is a backward pass like any other here, and wants the gradients of pruned weights, too
        decided = decide_on_main(update, now.score, now.masks, now.parameters)
        if decided is None and self.masks is not None:
            self._hold(model, self.masks)
        return decided

    def _score(self, model, parameters, progress: bool, criterion: str, joint: bool = False) -> Stream:
        if criterion in GRADIENT_CRITERIA:
            self.backward_passes += len(self.loaders) * self.config.score_batches
        shared = self._scoring(parameters, progress, joint)
        stream = score(model, self.loaders, criterion, seed=self.config.seed, **shared)
        if is_sharded(parameters):
            return stream
        return self._observed(stream, parameters, self.masks or {}, criterion, joint)

    def _observed(self, stream: Stream, weights, masks: Mapping[str, Tensor], criterion: str, joint: bool) -> Stream:
        """Hands whole scores on: keeps them, if they are to be kept, and what the tasks agree on for the log."""
        if self._scores_folder:
            stream = keep_scores(stream, self._scores_folder, masks)
        if joint or criterion not in TASK_CRITERIA or len(self.loaders) < 2:
            return stream  # nothing that tells tasks apart, or what to grow, which is zero now
        return self._agreement_logged(Watch(weights, self.config.sparsity, self.config.seed), stream)

    def _agreement_logged(self, watch: Watch, stream: Stream) -> Stream:
        """Hands the tasks' scores on, then has something to log."""
        yield from watch.watch(stream)
        self.measures = watch.scalars()

    def _gradients(self, model, parameters, progress: bool, joint: bool = False):
        self.backward_passes += len(self.loaders) * self.config.score_batches
        return gradients(model, self.loaders, **self._scoring(parameters, progress, joint))

    def _scoring(self, parameters, progress: bool, joint: bool) -> dict[str, Any]:
        """What `score` and `gradients` are asked alike."""
        return {
            "parameters": parameters,
            "num_batches": self.config.score_batches,
            "joint": joint,
            "task_weights": self._task_weights,
            "loss_fn": self._loss_fn,
            "average": self._average,
            "progress": progress,
        }

    def state(self) -> dict[str, Tensor]:
        """The method's, for a checkpoint."""
        return self.method.state() if self.method else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes a checkpoint's, when training begins."""
        self._loaded_state = state

    def _hold(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.release()
        parameters = dict(model.named_parameters())
        self.masks = {n: place(keep, parameters[n]) if n in parameters else keep for n, keep in masks.items()}
        apply_masks(model, self.masks)  # refuses the masks of another model
        if self.config and "layer" in self.config.granularity:
            model.skip_layers(sorted({*model.config.skipped_layers, *gone_layers(model, self.masks)}))
        self._mask_hooks = MaskHooks(model, self.masks)

    def release(self) -> None:
        """Lets the gradients of pruned weights pass again."""
        if self._mask_hooks:
            self._mask_hooks.remove()
            self._mask_hooks = None

    def end(self) -> None:
        """Lets go of the model."""
        if self.method:
            self.method.end()
        self.release()
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = []
