"""A guard undoes the pruning step that costs a task too much, to the bit, and says which task it was."""

import copy
import dataclasses
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback

from hf_disparse import (
    DisparseTrainer,
    PruningCallback,
    PruningConfig,
    RankConfig,
    UserError,
    last_whole_checkpoint,
    prunable_parameters,
)
from hf_disparse.masks import sparsity_report
from hf_disparse.schedule import sparsity_at, update_steps
from hf_disparse.trainer import guard
from hf_disparse.trainer.guard import worst_drop
from tests.cli_helpers import changed, hf_disparse, refused, write_inputs, write_recipe
from tests.test_resume import STEPS, DieAt, Died
from tests.test_trainer import BINARY, arguments, assert_same, multitask_trainer, plain_model, weights
from tests.tiny import three_datasets, tiny_model, tiny_tokenizer, tokenized_rows

torch.set_num_threads(1)

FIELDS = dict(sparsity=0.8, schedule="cubic", start_step=2, end_step=16, update_every=4, score_batches=2)
GUARDED = PruningConfig(**FIELDS, max_drop=5.0)
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


def zeros(model) -> tuple[int, int]:
    parameters = prunable_parameters(model).values()
    return sum(int((p == 0).sum()) for p in parameters), sum(p.numel() for p in parameters)


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
    from hf_disparse.config.methods import MovementConfig

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


@pytest.mark.parametrize("step", [7, 11, 12, 14, 19])
def test_a_killed_guarded_run_ends_in_the_bits_of_the_undisturbed_one(tmp_path, monkeypatch, step):
    """Dies before the step that will be undone, after it, as it is undone, and in the recovery."""
    plant(monkeypatch, {12: {"three": 7.0}, 20: {"two": 6.0}} if step == 14 else {12: {"three": 7.0}})
    whole = multitask_trainer(tmp_path / "whole", GUARDED, **STEPS)
    whole.train()
    with pytest.raises(Died):
        multitask_trainer(tmp_path, GUARDED, callbacks=[DieAt(step)], **STEPS).train()
    trainer = multitask_trainer(tmp_path, GUARDED, **STEPS)
    torch.manual_seed(99)
    trainer.train(resume_from_checkpoint=True)
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
    with pytest.raises(
        UserError, match="max_drop: expected to begin before pruning does, got a checkpoint of a run without"
    ):
        multitask_trainer(tmp_path, GUARDED, **STEPS).train(resume_from_checkpoint=True)


# Refusals


@pytest.mark.parametrize("value", [-1, 101, float("nan"), "1", True, {}, {"two": -0.5}, {"two": None}, [1]])
def test_what_is_no_number_of_points_is_refused(value):
    with pytest.raises(UserError, match=r"max_drop: expected points in 0 to 100, one number or a mapping"):
        PruningConfig(max_drop=value)


def test_a_schedule_without_growing_sparsity_is_refused():
    from hf_disparse.config.methods import DynamicConfig

    with pytest.raises(
        UserError, match="max_drop: expected nothing with schedule constant, whose sparsity does not grow"
    ):
        DynamicConfig(end_step=100, max_drop=1.0)


def test_the_promise_is_kept_in_files_and_is_no_reference_to_the_users_dict(tmp_path):
    drops = {"two": 1.5}
    config = PruningConfig(max_drop=drops)
    drops["two"] = 50
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config and config.max_drop == {"two": 1.5}


def test_tasks_that_cannot_be_measured_are_refused(tmp_path):
    with pytest.raises(UserError, match="max_drop: there is no task 'tow' in the evaluation data; did you mean 'two'"):
        multitask_trainer(tmp_path, PruningConfig(max_drop={"tow": 1}))
    for value in (None, {}):
        with pytest.raises(UserError, match="max_drop: expected an eval_dataset to measure the tasks on, got none"):
            DisparseTrainer(
                tiny_model(),
                arguments(tmp_path),
                pruning_config=GUARDED,
                train_dataset=three_datasets(),
                eval_dataset=value,
                processing_class=tiny_tokenizer(),
            )
    rows = tokenized_rows(BINARY, 40)
    with pytest.raises(UserError, match="max_drop: expected a MultitaskModel, whose metrics are known"):
        DisparseTrainer(
            plain_model(),
            arguments(tmp_path),
            pruning_config=GUARDED,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(UserError, match="max_drop: expected a DisparseTrainer, which measures the tasks"):
        Trainer(plain_model(), arguments(tmp_path), callbacks=[PruningCallback(GUARDED, {"only": []})])


def test_metrics_of_the_users_own_that_lack_a_tasks_are_refused_before_anything_is_pruned(tmp_path):
    trainer = multitask_trainer(tmp_path, GUARDED, **STEPS)
    trainer.compute_metrics = lambda prediction: {"mine": 1.0}
    with pytest.raises(UserError, match="max_drop: expected metrics of task 'two', got none from compute_metrics"):
        trainer.train()
    assert zeros(trainer.model)[0] == 0


# A recipe


@pytest.fixture
def recipe(tmp_path) -> dict:
    return changed(write_inputs(tmp_path), "pruning.max_drop", {"three": 2})


def test_train_says_which_task_stopped_it_at_which_sparsity(recipe, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(guard, "measure", lambda trainer, tasks: {"three": 50.0 - 3 * trainer.state.global_step})
    recipe = changed(recipe, "pruning.schedule", "cubic")
    recipe["pruning"] |= {"end_step": 3, "update_every": 1}
    status, out, err = hf_disparse("train", write_recipe(tmp_path, recipe))
    assert status == 0, err
    results = json.loads(Path(recipe["output_dir"], "results.json").read_text())
    stopped = results["guard"]["stopped"]
    config = PruningConfig(**recipe["pruning"])
    assert list(update_steps(config)) == [1, 2, 3]
    assert stopped["task"] == "three" and stopped["drop"] == 3.0 and stopped["step"] == 1 and stopped["kept"] == 0
    assert stopped["undone"] == pytest.approx(sparsity_at(config, 1), abs=1e-3)
    assert results["guard"]["max_drop"] == {"three": 2} and results["guard"]["before"] == {"three": 47.0}
    assert (
        f"guard:    three lost 3.0 points of at most 2 at {100 * stopped['undone']:.1f} %, which was undone to 0.0 %"
        in out
    )
    assert "task 'three' is 3.00 points below" in caplog.text  # on stderr, but pytest is before it
    assert results["sparsity"]["prunable"] == 0 and results["sparsity"]["target"] == 0.7
    card = Path(recipe["output_dir"], "README.md").read_text()
    assert "0.0 % of the prunable weights are pruned" in card and "the task three lost 3.0 points" in card


def test_train_says_that_every_promise_was_kept(recipe, tmp_path):
    status, out, err = hf_disparse("train", write_recipe(tmp_path, changed(recipe, "pruning.max_drop", 100)))
    assert status == 0 and "guard:    no task lost more than it may" in out, err
    results = json.loads(Path(recipe["output_dir"], "results.json").read_text())
    assert results["guard"]["stopped"] is None and results["guard"]["max_drop"] == {"two": 100, "three": 100}
    assert results["guard"]["before"] == {
        t: pytest.approx(results["dense"]["tasks"][t]["accuracy"]) for t in ("two", "three")
    }
    assert results["guard"]["after"] == {
        t: pytest.approx(results["sparse"]["tasks"][t]["accuracy"]) for t in ("two", "three")
    }
    assert results["sparsity"]["prunable"] == pytest.approx(0.7, abs=1e-3)


def test_a_task_that_is_not_evaluated_is_refused_before_training(recipe, tmp_path):
    path = write_recipe(tmp_path, changed(recipe, "helpers", ["three"]))
    refused("train", path, names=("pruning.max_drop: there is no task 'three' in the evaluation data",))
    assert not Path(recipe["output_dir"]).exists()


def test_a_comparison_at_named_sparsities_has_no_guard(recipe, tmp_path):
    path = write_recipe(tmp_path, recipe)
    refused("compare", path, "--seeds", "1", names=("pruning.max_drop: expected nothing in a comparison",))
