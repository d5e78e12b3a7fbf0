"""`dense_from`: the dense model of another run in place of one that is trained anew."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.commands import changed, hf_disparse, refused, snapshot, write_inputs, write_recipe
from tests.helpers.comparing import stopping

torch.set_num_threads(1)
OTHER = {"pruning.sparsity": 0.5, "recovery.learning_rate": 2e-3, "seed": 3}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def first(recipe, tmp_path_factory) -> Path:
    """A finished run of seed 3."""
    folder = tmp_path_factory.mktemp("first")
    status, _, err = hf_disparse(
        "train", write_recipe(folder, recipe | {"seed": 3}), "--output_dir", folder / "run", "--no-analysis"
    )
    assert status == 0 and "dense training, 4 steps" in err
    return folder / "run"


@pytest.fixture(scope="module")
def comparison(recipe, tmp_path_factory) -> Path:
    """A comparison of seed 3."""
    folder = tmp_path_factory.mktemp("comparison")
    words = ("--methods", "magnitude", "--seeds", "3", "--output_dir", folder / "compared")
    assert hf_disparse("compare", write_recipe(folder, recipe), *words)[0] == 0
    return folder / "compared"


@pytest.fixture(scope="module")
def other(recipe) -> dict:
    for key, value in OTHER.items():
        recipe = changed(recipe, key, value)
    return recipe


def run_of(recipe: dict, folder: Path) -> tuple[dict[str, torch.Tensor], dict, str]:
    """The weights and the results of `train`, and what it said."""
    status, _, err = hf_disparse("train", write_recipe(folder, recipe), "--output_dir", folder / "run", "--no-analysis")
    assert status == 0, err
    return (
        load_file(folder / "run" / "model.safetensors"),
        json.loads((folder / "run" / "results.json").read_text()),
        err,
    )


@pytest.fixture(scope="module")
def anew(other, tmp_path_factory) -> tuple[dict[str, torch.Tensor], dict, str]:
    return run_of(other, tmp_path_factory.mktemp("anew"))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["first", "comparison"])
def test_a_run_from_a_dense_model_that_is_there_ends_in_the_bits_of_one_that_trains_it(
    other, anew, source, request, tmp_path
):
    source = request.getfixturevalue(source)
    before = snapshot(source)
    weights, results, said = run_of({**other, "dense_from": str(source)}, tmp_path)
    assert "dense training" in anew[2] and "dense training" not in said and "sparse training" in said
    assert weights.keys() == anew[0].keys() and all(torch.equal(weights[name], anew[0][name]) for name in weights)
    for key in ("dense", "sparse", "sparsity"):
        assert results[key] == anew[1][key]
    assert snapshot(source) == before
    assert not [path.name for path in (tmp_path / "run" / "dense").glob("checkpoint-*")]


def test_a_comparison_takes_the_dense_model_of_its_seed(recipe, first, comparison, tmp_path):
    path = write_recipe(tmp_path, changed(recipe, "dense_from", str(first)))
    words = ("compare", path, "--methods", "magnitude", "--output_dir", tmp_path / "run")
    refused(*words, "--seeds", "3,4", names=(f"a finished dense model of seed 4 in {first}, got seed 3",))
    assert not (tmp_path / "run").exists()
    status, _, err = hf_disparse(*words, "--seeds", "3")
    assert status == 0 and "dense training" not in err
    name = "cells/magnitude-0.7-seed3.json"
    ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path / "run", comparison))
    assert ours["metrics"] == theirs["metrics"]


@pytest.mark.slow
def test_what_was_taken_needs_its_source_no_more(other, first, tmp_path):
    source = shutil.copytree(first, tmp_path / "source")
    path = write_recipe(tmp_path, {**other, "dense_from": str(source)})
    with stopping("sparse", 2, KeyboardInterrupt):
        assert hf_disparse("train", path, "--output_dir", tmp_path / "run", "--no-analysis")[0] == 130
    shutil.rmtree(source)
    status, _, err = hf_disparse("train", path, "--output_dir", tmp_path / "run", "--no-analysis")
    assert status == 0 and "dense training" not in err


@pytest.mark.slow
def test_a_copy_that_was_killed_is_made_again(other, anew, first, tmp_path):
    def dies(*args):
        raise KeyboardInterrupt

    recipe = {**other, "dense_from": str(first)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_disparse.files.sync", dies)
        patch.setattr("hf_disparse.files.TemporaryDirectory", lambda **where: nullcontext(mkdtemp(**where)))
        assert (
            hf_disparse("train", write_recipe(tmp_path, recipe), "--output_dir", tmp_path / "run", "--no-analysis")[0]
            == 130
        )
    assert len(list((tmp_path / "run").glob(".dense-*"))) == 1 and not (tmp_path / "run" / "dense").exists()
    weights, _, _ = run_of(recipe, tmp_path)
    assert all(torch.equal(weights[name], anew[0][name]) for name in weights)
    assert not list((tmp_path / "run").glob(".dense-*"))


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("dense_from", "no/such/folder", ("expected the folder of a run", "no/such/folder")),
        ("dense_from", 3, ("dense_from: expected the folder", "got 3")),
        ("seed", 4, ("a finished dense model of seed 4", "got seed 3")),
        ("training.max_steps", 5, ("has the same training.max_steps",)),
        ("tasks.two.validation_fraction", 0.5, ("has the same tasks.two.validation_fraction, got",)),
        ("tasks.two.weight", 2, ("has the same tasks.two.weight, got",)),
        ("training.sampling_cap", None, ("has the same training, got",)),  # an absent setting is not one that is null
        ("recovery.load_best_model_at_end", True, ("has the same load_best_model_at_end",)),
    ],
)
def test_another_dense_phase_is_refused_before_anything_is_written(recipe, first, tmp_path, key, value, names):
    recipe = {**recipe, "seed": 3, "dense_from": str(first)}
    if key == "recovery.load_best_model_at_end":
        recipe = changed(recipe, "recovery.eval_strategy", "steps")
    refused("train", write_recipe(tmp_path, changed(recipe, key, value)), "--output_dir", tmp_path / "run", names=names)
    assert not (tmp_path / "run").exists()


def test_a_dense_model_of_tasks_in_another_order_is_another_one(recipe, first, tmp_path):
    turned = {**recipe, "seed": 3, "dense_from": str(first), "tasks": dict(reversed(recipe["tasks"].items()))}
    refused("train", write_recipe(tmp_path, turned), names=("dense_from", "has the same order of tasks, got"))


def test_the_equal_budget_protocol_trains_its_own(recipe, first, tmp_path):
    path = write_recipe(tmp_path, {**recipe, "seed": 3, "dense_from": str(first)})
    refused("compare", path, "--protocol", "equal-budget", names=("dense_from: must not be set at equal budget",))
