"""The files of the tasks' scores: what they hold, where they are, and which methods keep none."""

from dataclasses import replace

import pytest

from hf_disparse import MultitaskModel, UserError, decide_again, find_masks, prunable_parameters
from hf_disparse.pruning.stored_scores import load_scores, scored_tasks
from tests.helpers.commands import changed, hf_disparse, write_inputs, write_recipe
from tests.helpers.tiny import tiny_model
from tests.helpers.training import SCORED, assert_same, count_pruned, multitask_trainer, saved_run


def test_the_files_hold_every_task_s_scores_as_they_were_decided_on(tmp_path):
    trainer = multitask_trainer(tmp_path, replace(SCORED, criterion="magnitude"), max_steps=1)
    dense = {name: p.detach().abs().clone() for name, p in prunable_parameters(trainer.model).items()}
    trainer.train()
    assert list(scored_tasks(tmp_path)) == ["two", "three", "real"]
    for path in scored_tasks(tmp_path).values():
        scores, masks = load_scores(path, dense)
        assert_same(dense, scores)
        assert count_pruned(masks) == 0
        size = sum(p.numel() for p in dense.values())
        assert 4 * size < path.stat().st_size < 4 * size + 4096


def test_checkpoints_go_without_and_a_model_saved_elsewhere_takes_them_along(tmp_path):
    trainer = saved_run(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "other"))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("scores/*"))
    tasks = ("real", "three", "two")
    assert found == [f"{folder}/scores/{task}.safetensors" for folder in ("other", "run") for task in tasks]


def test_scores_are_kept_only_where_they_are_asked_for(tmp_path):
    saved_run(tmp_path, replace(SCORED, keep_scores=False), max_steps=1)
    assert not (tmp_path / "scores").exists()
    with pytest.raises(UserError, match="keep_scores: true"):
        decide_again(tiny_model(), tmp_path)


def test_a_run_of_a_recipe_has_them_on_top(tmp_path):
    recipe = changed(write_inputs(tmp_path), "pruning.keep_scores", True)
    status, _, err = hf_disparse("train", write_recipe(tmp_path, recipe), "--no-analysis")
    assert status == 0, err
    run_folder = tmp_path / "run"
    assert not (run_folder / "sparse" / "scores").exists()
    dense, sparse = (MultitaskModel.from_pretrained(run_folder / phase) for phase in ("dense", "sparse"))
    expected = find_masks(prunable_parameters(sparse))
    assert count_pruned(expected) == round(0.7 * sum(keep.numel() for keep in expected.values()))
    assert_same(expected, decide_again(dense, run_folder))


def test_a_name_that_cannot_be_a_file_s_is_refused_before_training(tmp_path):
    trainer = multitask_trainer(tmp_path, SCORED)
    trainer.pruner.loaders = {"a/b": trainer.pruner.loaders["two"]}
    with pytest.raises(UserError, match="must be valid file names"):
        trainer.train()
