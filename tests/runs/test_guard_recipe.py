"""What a guard refuses of a config and of its tasks, and a recipe that asks for one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_disparse import DisparseTrainer, PruningCallback, PruningConfig, UserError
from hf_disparse.pruning.schedule import sparsity_at, update_steps
from hf_disparse.trainer import guard
from tests.helpers.commands import changed, hf_disparse, refused, write_inputs, write_recipe
from tests.helpers.resuming import GUARDED, STEPS
from tests.helpers.tiny import three_datasets, tiny_model, tiny_tokenizer, tokenized_rows
from tests.helpers.training import BINARY, arguments, multitask_trainer, plain_model, zeros

torch.set_num_threads(1)


# Refusals


@pytest.mark.parametrize("value", [-1, 101, float("nan"), "1", True, {}, {"two": -0.5}, {"two": None}, [1]])
def test_what_is_no_number_of_points_is_refused(value):
    with pytest.raises(UserError, match=r"max_drop: expected points in 0 to 100, one number or a mapping"):
        PruningConfig(max_drop=value)


def test_a_schedule_without_growing_sparsity_is_refused():
    from hf_disparse import DynamicConfig

    with pytest.raises(
        UserError, match="max_drop: must not be set with schedule constant, whose sparsity does not grow"
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
        with pytest.raises(UserError, match="max_drop: needs an eval_dataset to measure the tasks on"):
            DisparseTrainer(
                tiny_model(),
                arguments(tmp_path),
                pruning_config=GUARDED,
                train_dataset=three_datasets(),
                eval_dataset=value,
                processing_class=tiny_tokenizer(),
            )
    rows = tokenized_rows(BINARY, 40)
    with pytest.raises(UserError, match="max_drop: needs a MultitaskModel, whose metrics are known"):
        DisparseTrainer(
            plain_model(),
            arguments(tmp_path),
            pruning_config=GUARDED,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(UserError, match="max_drop: needs DisparseTrainer, which evaluates the tasks"):
        Trainer(plain_model(), arguments(tmp_path), callbacks=[PruningCallback(GUARDED, {"only": []})])


def test_metrics_of_the_users_own_that_lack_a_tasks_are_refused_before_anything_is_pruned(tmp_path):
    trainer = multitask_trainer(tmp_path, GUARDED, **STEPS)
    trainer.compute_metrics = lambda prediction: {"mine": 1.0}
    with pytest.raises(UserError, match="max_drop: compute_metrics returned no metrics for task 'two'"):
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
    status, out, err = hf_disparse("train", write_recipe(tmp_path, recipe), "--no-analysis")
    assert status == 0, err
    results = json.loads(Path(recipe["output_dir"], "results.json").read_text())
    stopped = results["guard"]["stopped"]
    config = PruningConfig(**recipe["pruning"])
    assert list(update_steps(config)) == [1, 2, 3]
    assert stopped["task"] == "three" and stopped["drop"] == 3.0 and stopped["step"] == 1 and stopped["kept"] == 0
    assert stopped["undone"] == pytest.approx(sparsity_at(config, 1), abs=1e-3)
    assert results["guard"]["max_drop"] == {"three": 2} and results["guard"]["before"] == {"three": 47.0}
    assert (
        f"guard:    three lost 3.0 points of at most 2 at {100 * stopped['undone']:.1f} %; pruning was undone to 0.0 %"
        in out
    )
    assert "task 'three' is 3.00 points below" in caplog.text  # on stderr, but pytest is before it
    assert results["sparsity"]["prunable"] == 0 and results["sparsity"]["target"] == 0.7
    card = Path(recipe["output_dir"], "README.md").read_text()
    assert "0.0 % of the prunable weights are pruned" in card and "the task three lost 3.0 points" in card


def test_train_says_that_every_promise_was_kept(recipe, tmp_path):
    status, out, err = hf_disparse(
        "train", write_recipe(tmp_path, changed(recipe, "pruning.max_drop", 100)), "--no-analysis"
    )
    assert status == 0 and "guard:    no task lost more than max_drop allows" in out, err
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
    refused("compare", path, "--seeds", "1", names=("pruning.max_drop: must not be set in a comparison",))
