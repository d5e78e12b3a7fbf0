"""A guard undoes the pruning step that costs a task too much, to the bit, and says which task it was."""

import copy
import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from hf_disparse import (
    DisparseTrainer,
    PruningConfig,
    RankConfig,
    UserError,
    last_whole_checkpoint,
    prunable_parameters,
)
from hf_disparse.model.sparsity import sparsity_report
from hf_disparse.pruning.schedule import sparsity_at
from hf_disparse.trainer import guard
from hf_disparse.trainer.guard import worst_drop
from tests.helpers.resuming import FIELDS, GUARDED, STEPS, killed_and_resumed, slow
from tests.helpers.tiny import three_datasets, tiny_model
from tests.helpers.training import BINARY, assert_same, multitask_trainer, weights, zeros

torch.set_num_threads(1)

UPDATES = [4, 8, 12, 16]  # of 20 steps
BEFORE = {"two": 90.0, "three": 70.0, "real": 50.0}


def plant(monkeypatch, drops: dict[int, dict[str, float]]) -> list[int]:
    """Makes the guard find `drops` at those steps and none at others; returns the steps at which it measured."""
    seen = []

    def planted(trainer, tasks):
        assert list(tasks) == list(BEFORE)
        seen.append(trainer.state.global_step)
        lost = drops.get(seen[-1], {})
        return {task: points - lost.get(task, 0.0) for task, points in BEFORE.items()}

    monkeypatch.setattr(guard, "measure", planted)
    return seen


class States(TrainerCallback):
    """What there was at the beginning of every step, before or after the pruner, and at the end."""

    def __init__(self):
        self.pruner, self.at = None, {}

    def on_step_begin(self, args, state, control, *, model, optimizer, lr_scheduler, **kwargs):
        masks = None if self.pruner.masks is None else {name: m.clone() for name, m in self.pruner.masks.items()}
        kept = copy.deepcopy((optimizer.state_dict(), lr_scheduler.state_dict()))
        self.at[state.global_step] = (weights(model), masks, *kept)

    def on_train_end(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control, **kwargs)


def same(first, second) -> bool:
    """Nested states, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def watched(folder, config, model=None, **changes) -> tuple[DisparseTrainer, States, States]:
    """A trained one, with its states before and after the pruner had its turn at every step."""
    before, after = States(), States()
    trainer = multitask_trainer(
        folder, config, model=model, callbacks=[before], **{**STEPS, "save_steps": 100} | changes
    )
    trainer.add_callback(after)
    before.pruner = after.pruner = trainer.pruner
    trainer.train()
    return trainer, before, after


# Which task


@given(st.lists(st.tuples(*[st.floats(0, 100)] * 3), min_size=1, max_size=5))
def test_the_task_named_is_the_one_that_lost_most_beyond_what_it_may(rows):
    before, now, most = ({f"t{i}": row[j] for i, row in enumerate(rows)} for j in range(3))
    excess = {task: before[task] - now[task] - most[task] for task in before}
    broken = {task: x for task, x in excess.items() if before[task] - now[task] > most[task]}
    found = worst_drop(before, now, most)
    if not broken:
        assert found is None
    else:
        assert excess[found[0]] == max(broken.values()) and found[1] == before[found[0]] - now[found[0]]


def test_exactly_what_is_allowed_is_allowed_and_nan_is_not():
    assert worst_drop({"a": 80.0}, {"a": 75.0}, {"a": 5.0}) is None
    assert worst_drop({"a": 80.0, "b": 1.0}, {"a": float("nan"), "b": 0.0}, {"a": 5.0, "b": 0.0})[0] == "a"


# Undone to the bit


@pytest.mark.parametrize("broken", [8, 12, 16])
def test_the_step_before_the_broken_promise_is_undone_to_the_bit_and_pruning_ends(
    tmp_path, monkeypatch, caplog, broken
):
    seen = plant(monkeypatch, {broken: {"two": 5.5, "three": 6.5}, 20: {"two": 5.0}})
    with caplog.at_level(logging.WARNING, logger="hf_disparse"):
        trainer, before, after = watched(tmp_path, GUARDED)
    undone = UPDATES[UPDATES.index(broken) - 1]
    assert same(after.at[broken], before.at[undone])
    assert not same(before.at[broken][0], before.at[undone][0]), "nothing was there to undo"
    assert seen == [step for step in UPDATES if step <= broken] + [20]
    wanted = [step for step in UPDATES if step < undone]
    pruned, size = zeros(trainer.model)
    kept = sparsity_at(GUARDED, wanted[-1]) if wanted else 0.0
    assert pruned == round(kept * size), "the sparsity that kept the promise is held to the end"
    assert not same(after.at[broken][0], weights(trainer.model)) and trainer.state.global_step == 20
    counts = [
        (m is None) or sum(int((~keep).sum()) for keep in m.values()) for _, m, *_ in list(after.at.values())[broken:]
    ]
    assert set(counts) == {True if not wanted else pruned}
    stopped = trainer.pruner.guard.stopped
    assert (stopped["task"], stopped["drop"], stopped["step"]) == ("three", 6.5, undone)
    assert stopped["kept"] == pruned / size and stopped["undone"] == round(sparsity_at(GUARDED, undone) * size) / size
    (entry,) = [row for row in trainer.state.log_history if "guard_three_drop" in row]
    assert entry == {
        "guard_three_drop": 6.5,
        "guard_undone_sparsity": stopped["undone"],
        "guard_kept_sparsity": stopped["kept"],
        **{key: entry[key] for key in ("epoch", "step")},
    }
    assert entry["step"] == broken
    assert "task 'three' is 6.50 points below" in caplog.text and f"weights of step {undone}" in caplog.text


def test_the_last_pruning_step_is_judged_once_training_has_ended(tmp_path, monkeypatch):
    plant(monkeypatch, {20: {"real": 5.01}})
    trainer, before, _ = watched(tmp_path, GUARDED)
    assert_same(weights(trainer.model), before.at[16][0])
    assert trainer.pruner.guard.stopped["step"] == 16 and trainer.pruner.guard.stopped["task"] == "real"
    assert trainer.pruner.guard.after == BEFORE
    pruned, size = zeros(trainer.model)
    assert pruned == round(sparsity_at(GUARDED, 12) * size) == round(trainer.pruner.guard.stopped["kept"] * size)
    trainer.save_model()
    trainer.create_model_card()
    assert f"{100 * pruned / size:.1f} % of the prunable weights are pruned" in Path(tmp_path, "README.md").read_text()
    assert_same(before.at[16][1], trainer.pruner.masks)


def test_one_shot_is_undone_to_the_dense_model(tmp_path, monkeypatch):
    plant(monkeypatch, {20: {"two": 50.0}})
    trainer, before, _ = watched(
        tmp_path, PruningConfig(sparsity=0.9, start_step=3, score_batches=2, max_drop={"two": 1, "three": 1, "real": 1})
    )
    assert_same(weights(trainer.model), before.at[3][0])
    assert zeros(trainer.model)[0] == 0 and trainer.pruner.masks is None
    assert trainer.pruner.guard.stopped["kept"] == 0.0


def test_a_guard_counts_ranks_as_results_do(tmp_path, monkeypatch):
    """In numbers of the matrices as they were dense, which two factors at full rank are more than."""
    config = RankConfig(**FIELDS | {"sparsity": 0.5}, max_drop=5.0)
    plant(monkeypatch, {20: {"two": 9.0}})
    trainer, *_ = watched(tmp_path, config)
    stopped, kept = (
        trainer.pruner.guard.stopped,
        sparsity_report(trainer.model, trainer.model, prunable_parameters(trainer.model)),
    )
    assert stopped["kept"] == kept["prunable"] < stopped["undone"] and stopped["undone"] == pytest.approx(0.5, abs=0.1)
    plant(monkeypatch, {8: {"two": 9.0}})
    stopped = watched(tmp_path, config)[0].pruner.guard.stopped
    dense = sum(p.numel() for p in prunable_parameters(tiny_model()).values())
    factors = sum(min(p.shape) * sum(p.shape) for p in prunable_parameters(tiny_model()).values())
    assert stopped["kept"] == 1 - factors / dense < 0


def test_training_that_breaks_the_promise_after_pruning_ended_is_undone_as_well(tmp_path, monkeypatch):
    plant(monkeypatch, {12: {"two": 9.0}, 20: {"three": 8.0}})
    trainer, before, after = watched(tmp_path, GUARDED)
    assert same(after.at[12], before.at[8])
    assert_same(weights(trainer.model), before.at[8][0])
    assert trainer.pruner.guard.stopped["task"] == "two", "which ended pruning"
    assert [row["step"] for row in trainer.state.log_history if "guard_kept_sparsity" in row] == [12, 20]


def test_pruned_layers_run_again(tmp_path, monkeypatch):
    plant(monkeypatch, {12: {"two": 9.0}})
    config = PruningConfig(
        sparsity=0.5, granularity="layer", schedule="cubic", end_step=12, update_every=6, score_batches=1, max_drop=5
    )
    skipped = []

    class Skipped(TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **kwargs):
            skipped.append(len(model.config.skipped_layers))

    trainer = multitask_trainer(tmp_path, config, callbacks=[Skipped()], **STEPS)
    trainer.train()
    assert skipped[6] == 0 and skipped[7:13] == [1] * 6 and skipped[13:] == [0] * 7
    assert trainer.model.config.skipped_layers == [] and zeros(trainer.model)[0] == 0


def test_weights_that_movement_pruning_holds_back_are_not_lost_to_the_undone_step(tmp_path, monkeypatch):
    """The method is out afterwards: the weights are the effective ones, and what was pruned then is pruned."""
    from hf_disparse import MovementConfig

    plant(monkeypatch, {12: {"three": 6.5}})
    fields = {key: FIELDS[key] for key in ("sparsity", "start_step", "end_step", "update_every")}
    trainer, before, after = watched(tmp_path, MovementConfig(**fields, max_drop=5))
    assert same(after.at[12], before.at[8]) and trainer.pruner.guard.stopped["step"] == 8
    pruned, size = zeros(trainer.model)
    assert pruned == round(sparsity_at(GUARDED, 4) * size) == sum(int((~m).sum()) for m in before.at[8][1].values())


def test_a_second_training_has_a_guard_of_its_own(tmp_path, monkeypatch):
    seen = plant(monkeypatch, {12: {"two": 9.0}})
    trainer = multitask_trainer(tmp_path, GUARDED, **STEPS)
    trainer.train()
    assert trainer.pruner.guard.stopped and seen == [4, 8, 12, 20]
    seen = plant(monkeypatch, {})
    trainer.train()
    assert trainer.pruner.guard.stopped is None and seen == [*UPDATES, 20]
    pruned, size = zeros(trainer.model)
    assert pruned == round(0.8 * size)


# What it measures


def test_a_guard_that_has_nothing_to_say_leaves_every_bit_as_it_was(tmp_path):
    """It measures six times, and neither dropout nor the order of the data hears of it."""
    plain = multitask_trainer(tmp_path, PruningConfig(**FIELDS), **STEPS)
    plain.train()
    guarded = multitask_trainer(tmp_path, PruningConfig(**FIELDS, max_drop=100), **STEPS)
    guarded.train()
    assert_same(weights(plain.model), weights(guarded.model))
    history = [
        [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in t.state.log_history]
        for t in (plain, guarded)
    ]
    assert history[0] == history[1]
    assert guarded.pruner.guard.stopped is None and guarded.backward_passes == plain.backward_passes


def test_a_metric_that_is_nan_before_pruning_is_refused_then(tmp_path, monkeypatch):
    trainer = multitask_trainer(tmp_path, PruningConfig(sparsity=0.5, max_drop=5), **STEPS)
    monkeypatch.setattr(guard, "measure", lambda trainer, tasks: dict(BEFORE, three=float("nan")))
    with pytest.raises(UserError, match=r"pruning\.max_drop: task 'three' has a metric of nan before pruning"):
        trainer.train()


def test_points_are_the_mean_of_a_tasks_metrics_times_100_on_the_evaluation_data(tmp_path):
    trainer = multitask_trainer(tmp_path, PruningConfig(**FIELDS, max_drop={"real": 100, "two": 100}), **STEPS)
    trainer.tasks["two"] = dataclasses.replace(BINARY, metric=["accuracy", "f1"])
    trainer.train()
    metrics = trainer.evaluate()
    wanted = {
        task: 100 * float(np.mean([metrics[f"eval_{task}_{m}"] for m in trainer.tasks[task].metric]))
        for task in ("real", "two")
    }
    assert trainer.pruner.guard.after == pytest.approx(wanted, abs=1e-12)
    assert trainer.pruner.guard.most == {"real": 100, "two": 100}


def test_a_drop_that_is_real_is_found(tmp_path):
    """A model that has learned the task and then loses all but a hundredth of its weights."""
    config = PruningConfig(sparsity=0.99, criterion="random", start_step=60, max_drop=3)
    trainer = multitask_trainer(tmp_path, config, max_steps=61, learning_rate=3e-3, task_sampling="round_robin")
    trainer.train_dataset = trainer.eval_dataset = {n: rows for n, rows in three_datasets().items()}
    trainer.train()
    found = trainer.pruner.guard
    metrics = trainer.evaluate()
    assert found.stopped and zeros(trainer.model)[0] == 0
    assert (
        found.before
        == found.after
        == {
            task: pytest.approx(100 * metrics[f"eval_{task}_{config.metric[0]}"])
            for task, config in trainer.tasks.items()
        }
    )


# Resume


@pytest.mark.parametrize("step", [14, *slow(7, 11, 12, 19)])
def test_a_killed_guarded_run_ends_in_the_bits_of_the_undisturbed_one(tmp_path, monkeypatch, step):
    """Dies before the step that will be undone, after it, as it is undone, and in the recovery."""
    plant(monkeypatch, {12: {"three": 7.0}, 20: {"two": 6.0}} if step == 14 else {12: {"three": 7.0}})
    whole = multitask_trainer(tmp_path / "whole", GUARDED, **STEPS)
    whole.train()
    trainer = killed_and_resumed(tmp_path, GUARDED, step, **STEPS)
    assert_same(weights(whole.model), weights(trainer.model))
    assert_same(whole.pruner.masks, trainer.pruner.masks)
    assert whole.pruner.guard.report() == trainer.pruner.guard.report() and trainer.pruner.guard.stopped["step"] == 8
    key = "guard_kept_sparsity"
    ends = [[row for row in t.state.log_history if key in row] for t in (whole, trainer)]
    assert ends[0] == ends[1] and len(ends[0]) == (2 if step == 14 else 1)


def test_a_run_killed_after_its_last_checkpoint_is_judged_again(tmp_path, monkeypatch):
    plant(monkeypatch, {step: {"three": 7.0} for step in (18, 19)})  # a resumed Trainer takes a step before it looks
    steps = STEPS | {"max_steps": 18}
    whole = multitask_trainer(tmp_path, GUARDED, **steps)
    whole.train()
    again = multitask_trainer(tmp_path, GUARDED, **steps)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18"))
    assert_same(weights(whole.model), weights(again.model))
    assert again.pruner.guard.report() == whole.pruner.guard.report()


def test_no_checkpoint_has_a_copy_before_pruning_began_and_a_torn_one_is_passed_over(tmp_path, monkeypatch):
    plant(monkeypatch, {})
    multitask_trainer(tmp_path, GUARDED, **STEPS | {"max_steps": 18}).train()
    assert not (tmp_path / "checkpoint-3" / "guard").exists()
    assert {p.name for p in (tmp_path / "checkpoint-6" / "guard").iterdir()} == {"guard.json", "guard.safetensors"}
    assert (tmp_path / "checkpoint-18" / "guard" / "pruning_masks.safetensors").is_file()
    os.truncate(tmp_path / "checkpoint-18" / "guard" / "guard.safetensors", 5000)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-15")


def test_a_checkpoint_of_a_run_without_the_guard_is_refused(tmp_path):
    multitask_trainer(tmp_path, PruningConfig(**FIELDS), **STEPS | {"max_steps": 18}).train()
    with pytest.raises(UserError, match="max_drop: cannot be added once pruning has begun; start a new run"):
        multitask_trainer(tmp_path, GUARDED, **STEPS).train(resume_from_checkpoint=True)
